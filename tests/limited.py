"""`python limited.py MB STEP WORDS`: mmft in a process that may take so many MB of address space more from the beginning of a step on.

Prints the peak of the whole run above what it had there, so that a first run without a limit (MB=0) says where to put one.
"""

from __future__ import annotations

import resource
import sys

import psutil


def main() -> int:
    from mmft.cli.main import main as mmft
    from mmft.training.trainer import FiniteStep

    megabytes, step = int(sys.argv[1]), int(sys.argv[2])
    begin, taken = FiniteStep.on_step_begin, []

    def on_step_begin(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        if state.global_step == step and not taken:
            taken.append(psutil.Process().memory_info().vms)
            if megabytes:
                resource.setrlimit(resource.RLIMIT_AS, (taken[0] + (megabytes << 20), -1))

    FiniteStep.on_step_begin = on_step_begin
    code = mmft(sys.argv[3:])
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) >> 10 for line in file if line.startswith("VmPeak"))
    print(f"PEAK {peak - (taken[0] >> 20 if taken else 0)} MB above")
    return code


if __name__ == "__main__":
    sys.exit(main())
