"""`python limited.py MB STEP WORDS`: run mmft; from the beginning of a step on, limit its address space to so many MB more.

Prints the peak of the run above its memory at that step, so that a first run without a limit (MB=0) shows which limit to use.
"""

from __future__ import annotations

import resource
import sys

import psutil


def main() -> int:
    from mmft.cli.main import main as mmft
    from mmft.training.callbacks import FiniteStep

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
