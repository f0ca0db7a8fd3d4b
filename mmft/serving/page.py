"""The page of `mmft compare ui=true`: every model's answer to samples of the data set and to uploaded pictures, side by side.

It listens on 127.0.0.1, or on another address that the command names, and then only with a login. No share link, no analytics,
pictures sent as data, no file of this machine served.
"""

from __future__ import annotations

import ipaddress
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..data.images import ImageError, open_image
from ..data.prepare import prepared_data
from ..data.prepared import PreparedData
from ..data.sample import Sample
from ..data.selection import evaluation_rows
from ..evaluation.inputs import ask
from ..runs.open import open_run, run_config
from . import page_html
from .side_by_side import Bench, Model, generation_keys

if TYPE_CHECKING:
    from omegaconf import DictConfig

HOST = "127.0.0.1"
# The login comes from the environment: values of a config or a command are stored in files, and visible in the list of processes.
USER, PASSWORD = "MMFT_UI_USER", "MMFT_UI_PASSWORD"
MIN_PASSWORD = 12  # characters; the page does not limit the rate of attempts


def login(host: str) -> tuple[str, str] | None:
    """(user, password) that the page asks for; None on 127.0.0.1 without a password in the environment.

    Raises UserError for an address that others can reach when there is no password, or a short one.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise UserError(f"host={host}: must be an address of this machine, as 127.0.0.1 or 0.0.0.0 (all of them)") from None
    password = os.environ.get(PASSWORD, "")
    if not password and host == HOST:
        return None
    if len(password) < MIN_PASSWORD:
        what = f"is {len(password)} characters long" if password else "is not set"
        raise UserError(f"host={host}: others can reach this page, so it needs a login: put a password of {MIN_PASSWORD} characters or more into the"
                        f" environment variable {PASSWORD} (it {what}), or leave host=127.0.0.1 and reach it by ssh -L")  # fmt: skip
    return os.environ.get(USER) or "mmft", password


def free_port(port: int, host: str = HOST) -> int:
    """`port`, or any free one for 0. Raises UserError if it is taken."""
    if not 0 <= port <= 65535:
        raise UserError(f"port={port}: must lie between 0 and 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if os.name != "nt":  # on Windows this option would take a port from its owner
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            where = f"host={host} port={port}" if host != HOST else f"port={port}"
            raise UserError(f"{where}: cannot be used ({error.strerror or error}); name another, or port=0 for any free one") from None
        return probe.getsockname()[1]


def serve(paths: list[str], checkpoint: int | None, cfg: DictConfig, overrides: list[str], port: int, host: str = HOST) -> None:
    """Load the models and serve the page until Ctrl-C. Raises UserError before weights are read."""
    if find_spec("gradio") is None:
        raise UserError("ui=true needs Gradio: pip install 'mmft[ui]'")
    user_and_password = login(host)
    free_port(port, host)
    _, run_cfg = run_config(paths[0], cfg, overrides)
    prepared = prepared_data(run_cfg)
    split = run_cfg.evaluation.split
    evaluation_rows(prepared, {"split": split or next(iter(prepared.splits)), "max_samples": None})
    models = []
    for i, path in enumerate(paths):
        opened = open_run(path, cfg, overrides, checkpoint)
        if len(paths) == 1:
            models.append(Model("base", "base", f"{opened.loaded.located.path}, the adapter switched off", opened, base=True))
            models.append(Model("tuned", "tuned", f"{path}{f', checkpoint {checkpoint}' if checkpoint is not None else ''}", opened))
        else:
            models.append(Model(chr(ord("A") + i), "tuned" if i else "base", path, opened))
    with tempfile.TemporaryDirectory(prefix="mmft-ui-", ignore_cleanup_errors=True) as folder:
        for key, value in (("GRADIO_TEMP_DIR", folder), ("GRADIO_ANALYTICS_ENABLED", "False"), ("HF_HUB_DISABLE_TELEMETRY", "1")):
            os.environ[key] = value
        for key in ("NO_PROXY", "no_proxy"):  # Gradio requests its own address to check that it is up
            os.environ[key] = ",".join(filter(None, [os.environ.get(key), HOST, host]))
        page, options = build(models, prepared, split)
        try:
            page.launch(
                server_name=host, server_port=free_port(port, host), auth=user_and_password, share=False, allowed_paths=[], max_file_size="64mb", ssr_mode=False, quiet=True,
                prevent_thread_lock=True, show_error=True, inbrowser=False, enable_monitoring=False, mcp_server=False, **options,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"port={port}: cannot be used ({error}); name another, or port=0 for any free one") from None
        print(f"\n{page.local_url}  ({'only on this machine' if host == HOST else 'for all who can reach this machine'}{f', user {user_and_password[0]}' if user_and_password else ''}; Ctrl-C ends it)", flush=True)
        if user_and_password and host != HOST:
            print("The login and the pictures travel unencrypted: for a network you do not trust, put https before it, or use ssh -L", flush=True)
        try:
            # SIGTERM, too, ends the page in this way, so that uploaded pictures are removed
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print()
        finally:
            page.close(verbose=False)


def reason(error: UserError) -> str:
    """The error with an uploaded picture's own name instead of Gradio's temporary path."""
    return f"{Path(error.name).name}: {error.reason}" if isinstance(error, ImageError) else str(error)


def build(models: Sequence[Model], prepared: PreparedData, split: str | None) -> tuple[Any, dict[str, Any]]:
    """(the page as gradio.Blocks, the launch options that style it)."""
    import gradio as gr

    bench = Bench(models)
    rows = {name: prepared.split(name) for name in prepared.splits}
    split = split if split is not None and split in rows else next(iter(rows))
    defaults = models[-1].opened.settings["generation"]

    def show(name: str, index: float | None) -> str:
        return page_html.sample_html(rows[name][place(name, index)])

    def place(name: str, index: float | None) -> int:
        return min(max(int(index or 0), 0), len(rows[name]) - 1)

    def answer(sample: Sample, controls: Sequence[float]) -> Iterator[str]:
        *numbers, seed = controls
        try:
            references = models[-1].opened.collator.written(sample).references
            for state in bench.answers(sample, generation_keys(*numbers), int(seed or 0)):
                yield page_html.answers_html(models, state, list(references), int(numbers[3]), sample)
        except UserError as error:
            yield page_html.error_html(reason(error))

    def from_data(name: str, index: float | None, *controls: float) -> Iterator[str]:
        yield from answer(rows[name][place(name, index)], controls)

    def from_own(files: list[Any] | None, question: str, reference: str, *controls: float) -> Iterator[str]:
        paths = [Path(str(getattr(f, "name", f))) for f in files or ()]
        asked = ask("your picture", paths, question.strip(), [reference.strip()] if reference.strip() else [])
        if not paths or asked.sample is None:
            yield page_html.error_html(asked.error or "Choose a picture first.")
            return
        yield from answer(asked.sample, controls)

    def preview(files: list[Any] | None) -> str:
        try:
            return page_html.pictures_html([open_image(str(getattr(f, "name", f))) for f in files or ()])
        except UserError as error:
            return page_html.error_html(reason(error))

    with gr.Blocks(title="mmft compare", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.HTML(page_html.head_html(models))
        with gr.Row(equal_height=True):
            controls = [
                gr.Number(defaults.get("max_new_tokens") or 64, precision=0, minimum=1, label="max_new_tokens", elem_id="max_new_tokens"),
                gr.Slider(0, 2, (defaults.get("temperature") or 1.0) if defaults.get("do_sample") else 0, step=0.05, label="temperature", elem_id="temperature"),
                gr.Slider(0.05, 1, defaults.get("top_p") or 1.0, step=0.05, label="top_p", elem_id="top_p"),
                gr.Slider(1, 8, defaults.get("num_beams") or 1, step=1, label="num_beams", elem_id="num_beams"),
                gr.Number(models[0].opened.settings["seed"], precision=0, label="seed", elem_id="seed"),
            ]
        with gr.Tabs():
            with gr.Tab("Sample of the data set"), gr.Row():
                with gr.Column(scale=2, min_width=280):
                    with gr.Row():
                        index = gr.Number(0, precision=0, minimum=0, label="index", elem_id="index", min_width=80)
                        name = gr.Dropdown(list(rows), value=split, label=f"split of {prepared.manifest['name']}", elem_id="split", min_width=200)
                    with gr.Row():
                        steps = [gr.Button(text, size="md", min_width=60) for text in ("Previous", "Next", "Random")]
                        go = gr.Button("Compare", variant="primary", size="md", min_width=90, elem_id="compare-sample")
                    shown = gr.HTML(show(split, 0), elem_id="sample")
                with gr.Column(scale=3, min_width=320):
                    out = gr.HTML(page_html.answers_html(models, None, []), elem_id="sample-answers")
            with gr.Tab("Your own picture"), gr.Row():
                with gr.Column(scale=2, min_width=280):
                    files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], elem_id="own-files", height=140)
                    view = gr.HTML("", elem_id="own-pictures")
                    question = gr.Textbox(label="Question", lines=2, elem_id="question")
                    reference = gr.Textbox(label="Reference (if you know the answer)", elem_id="reference")
                    own_go = gr.Button("Compare", variant="primary", elem_id="compare-own")
                with gr.Column(scale=3, min_width=320):
                    own_out = gr.HTML(page_html.answers_html(models, None, []), elem_id="own-answers")
        gr.HTML(page_html.NOTE)
        with gr.Accordion("Parameters", open=False):
            gr.HTML(page_html.parameters_html(models))

        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        moves = (lambda n, i: place(n, (i or 0) - 1), lambda n, i: place(n, (i or 0) + 1), lambda n, i: random.Random().randrange(len(rows[n])))
        for button, move in zip(steps, moves, strict=True):
            button.click(move, [name, index], index, **hidden)
        files.change(preview, files, view, **hidden)
        single = {"concurrency_limit": 1, "concurrency_id": "models", **hidden}
        running = go.click(from_data, [name, index, *controls], out, **single)
        for chosen in (index, name):  # clear the answers to the sample before
            chosen.change(lambda n, i: (show(n, i), page_html.answers_html(models, None, [])), [name, index], [shown, out], cancels=[running], **hidden)
        for event in (own_go.click, question.submit):
            event(from_own, [files, question, reference, *controls], own_out, **single)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # no font is downloaded
    return page.queue(api_open=False), {"theme": gr.themes.Base(primary_hue="sky", **fonts), "css": page_html.CSS, "footer_links": []}
