"""`lora-from-scratch serve`: serve many adapters of one model over HTTP."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

from lora_from_scratch.cli import options as shared

POOL_MIB = 256
GRACE = 30  # seconds that running requests have to finish when the server is stopped


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "serve",
        usage="%(prog)s --adapters DIRECTORY [--flag value ...]",
        help="serve many adapters at once over HTTP",
        description="Serve a model and a directory of adapters over an API compatible with OpenAI's clients. The name "
        "of an adapter is that of its directory.",
    )
    shared.add_model(parser)
    parser.add_argument(
        "--adapters", type=shared.directory, metavar="DIRECTORY", help="the folder with the adapter directories (none)"
    )
    shared.add_device(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="the address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="the port; 0: any free port (%(default)s)")
    parser.add_argument(
        "--pool", type=int, default=POOL_MIB, metavar="MIB", help="memory for keys, values and adapters (%(default)s)"
    )
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="maximum requests in a batch (%(default)s)")
    parser.add_argument("--waiting", type=int, default=256, metavar="N", help="maximum waiting requests (%(default)s)")
    parser.add_argument(
        "--allow-updates", action="store_true", help="let clients load adapters from any path, and unload them"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    try:
        import uvicorn

        from lora_from_scratch.serving.server import Server
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs the package {error.name}: pip install 'lora-from-scratch[serve]'") from None
    from lora_from_scratch.finetune.distributed import find_device
    from lora_from_scratch.models.checkpoint import load_language_model
    from lora_from_scratch.serving.adapter_store import AdapterStore
    from lora_from_scratch.serving.any_model import page_layout
    from lora_from_scratch.serving.page_pool import PagePool
    from lora_from_scratch.serving.scheduler import Scheduler

    for name, least in (("pool", 1), ("rows", 1), ("waiting", 0), ("port", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    device = find_device(options.device)
    model, tokenizer = load_language_model(options.model)
    model.to(device)
    layout = page_layout(model)
    pages = options.pool * 2**20 // (4 * layout.size)
    store = AdapterStore(model, PagePool(layout, pages, device), options.adapters)
    base = Path(options.model).name
    server = Server(
        Scheduler(model, store, options.rows),
        tokenizer,
        base,
        max_waiting=options.waiting,
        allow_updates=options.allow_updates,
    )
    listening = _listen(options.host, options.port)
    config = uvicorn.Config(server.app, log_level="warning", timeout_graceful_shutdown=GRACE)
    host, port = listening.getsockname()[:2]
    print(f"serving {base} and its adapters at http://{host}:{port}/v1 ({pages} pages); stop with Ctrl-C", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from None
