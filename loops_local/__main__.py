"""The command line: ``loops-local serve``, ``loops-local dashboard`` and ``loops-local faults``."""

from __future__ import annotations

import argparse
import asyncio
import errno
import io
import logging
import math
import os
import signal
import sys
import textwrap
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path

import msgspec

from ._http.paths import CONTROL_PLANE, DASHBOARD_DATA
from ._service import DEFAULT_MODELS, OPENS_DASHBOARD, LocalService, dashboard_url, home
from ._storage.store import StoreLockedError
from .engine import DTYPES, KINDS, RefusedError
from .faults import FaultProxy, read_plan
from .faults.proxy import COUNTS_PATH

__all__ = ["main"]

DEFAULT_PORT = 8460
_ANSWER_SECONDS = 10.0
_ABOUT = {
    "torch": "torch (real training and sampling)",
    "echo": "echo (no model: completions repeat the prompt, and nothing is learned)",
}


def main() -> None:
    """Run the command line and exit: 0 after Ctrl-C or SIGTERM, 1 with one line on stderr after an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have characters that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    log = logging.getLogger("loops_local")
    if log.level == logging.NOTSET:  # else LOOPS_LOG has set it
        log.setLevel(logging.INFO)
    try:
        asyncio.run(arguments.run(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except (StoreLockedError, RefusedError, ImportError, ValueError) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            _fail(f"port {arguments.port} of {arguments.host} is in use; choose another with --port (0 takes any)")
        _fail(f"cannot start: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loops-local", description="Baseten Loops on this machine.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(
        commands.add_parser(
            "serve",
            formatter_class=_Help,
            help="run the service until Ctrl-C",
            description="Run the service until Ctrl-C. The API key is that of BASETEN_API_KEY; without it, a key is "
            "generated and kept in the data directory.",
        )
    )
    _add_dashboard(
        commands.add_parser(
            "dashboard",
            formatter_class=_Help,
            help="print the address of the dashboard of a service that runs",
            description="Print the address of the dashboard of a service that runs on this machine. It contains the "
            "token of the service's data directory, which opens the dashboard and nothing else.",
        )
    )
    _add_faults(
        commands.add_parser(
            "faults",
            formatter_class=_Help,
            help="run a proxy before a service that makes planned faults happen, until Ctrl-C",
            description="Run a proxy before any service that makes the faults of a plan happen, until Ctrl-C; then "
            "print what it did as JSON. While it runs, GET /-/faults of the proxy shows the same.",
        )
    )
    return parser


class _Help(argparse.HelpFormatter):
    """Cuts no word, e.g. the name of a model."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        line = " ".join(text.split())
        return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.set_defaults(run=_serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_port, default=DEFAULT_PORT, help="0 takes any (default: %(default)s)")
    _add_data_dir(serve, "where state is kept")
    serve.add_argument("--engine", choices=KINDS, default="torch", help="default: %(default)s")
    serve.add_argument(
        "--model",
        action="append",
        help="a base model to offer: a Hugging Face directory or hub id; may be repeated "
        f"(default: {', '.join(DEFAULT_MODELS)}; echo takes any name)",
    )
    serve.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="precision of torch's base models (default: %(default)s)"
    )
    serve.add_argument(
        "--device",
        default="auto",
        help="where torch keeps its base models, e.g. cpu or cuda; auto is a GPU if there is one (the default)",
    )
    serve.add_argument(
        "--serverless", action="store_true", help="offer serverless runs and samplers, whose samples are queued"
    )
    serve.add_argument(
        "--provisioning-seconds",
        type=_seconds,
        default=0.5,
        metavar="S",
        help="how long trainers and samplers take to start (default: %(default)s)",
    )


def _add_data_dir(command: argparse.ArgumentParser, meaning: str) -> None:
    command.add_argument("--data-dir", type=Path, help=f"{meaning} (default: the user's data directory)")


def _add_dashboard(dashboard: argparse.ArgumentParser) -> None:
    dashboard.set_defaults(run=_show_dashboard)
    _add_data_dir(dashboard, "the data directory of the service")
    dashboard.add_argument(
        "--url", help=f"address of the service (default: LOOPS_BASE_URL, else http://127.0.0.1:{DEFAULT_PORT})"
    )
    dashboard.add_argument("--json", action="store_true", help="print an object with the field url")


def _add_faults(faults: argparse.ArgumentParser) -> None:
    faults.set_defaults(run=_inject_faults)
    faults.add_argument("--to", required=True, metavar="URL", help="the service, e.g. http://127.0.0.1:8460")
    faults.add_argument("--plan", required=True, type=Path, metavar="FILE", help="the faults, as TOML or JSON")
    faults.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    faults.add_argument("--port", type=_port, default=0, help="0 takes any (default: %(default)s)")
    faults.add_argument("--seed", type=int, help="of what happens to which request (default: a new one, printed)")


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535; got {port}")
    return port


def _seconds(text: str) -> float:
    seconds = float(text)
    if not math.isfinite(seconds) or seconds < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more; got {text}")
    return seconds


async def _serve(arguments: argparse.Namespace) -> None:
    stopping = _stop_on_signals()
    key = os.environ.get("BASETEN_API_KEY") or None
    local = LocalService(
        engine=arguments.engine,
        models=arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        data_dir=arguments.data_dir or _default_data_dir(),
        host=arguments.host,
        port=arguments.port,
        api_key=key,
        serverless=arguments.serverless,
        provisioning_seconds=arguments.provisioning_seconds,
    )
    async with local:
        loading = asyncio.ensure_future(local.load())
        waiting = asyncio.ensure_future(stopping.wait())
        await asyncio.wait((loading, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            await loading
            _print_banner(local, key_is_from_environment=key is not None)
        await waiting
        loading.cancel()


async def _show_dashboard(arguments: argparse.Namespace) -> None:
    address = arguments.url or os.environ.get("LOOPS_BASE_URL") or f"http://127.0.0.1:{DEFAULT_PORT}"
    root = address.rstrip("/").removesuffix(CONTROL_PLANE)
    data_dir = arguments.data_dir or _default_data_dir()
    url = await asyncio.to_thread(_checked_dashboard_url, root, data_dir)
    _print(msgspec.json.encode({"url": url}).decode() if arguments.json else url)


def _checked_dashboard_url(root: str, data_dir: Path) -> str:
    """Return the address of a dashboard that opens; a ValueError says what is wrong otherwise."""
    path = data_dir / OPENS_DASHBOARD
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name the service's data directory with --data-dir") from None
    if not root.startswith(("http://", "https://")):
        raise ValueError(f"--url must begin with http:// or https://; got {root!r}")
    request = urllib.request.Request(  # noqa: S310 - checked just above
        root + DASHBOARD_DATA, headers={"Authorization": f"Bearer {token}"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the service is on this machine
    try:
        opener.open(request, timeout=_ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == HTTPStatus.UNAUTHORIZED:
            raise ValueError(f"the service at {root} has another data directory; name it with --data-dir") from None
        raise ValueError(f"what answers at {root} has no dashboard (status {error.code})") from None
    except OSError as error:
        problem = f"no service answers at {root} ({error}); start it with loops-local serve, or name another with --url"
        raise ValueError(problem) from None
    return dashboard_url(root, token)


async def _inject_faults(arguments: argparse.Namespace) -> None:
    stopping = _stop_on_signals()
    plan = await asyncio.to_thread(read_plan, arguments.plan)
    async with FaultProxy(
        to=arguments.to, plan=plan, seed=arguments.seed, host=arguments.host, port=arguments.port
    ) as proxy:
        lines = [
            f"Faults are injected at {proxy.base_url} on the way to {arguments.to}",
            f"  plan    {arguments.plan}, {len(plan)} faults",
            f"  seed    {proxy.seed}",
            f"  counts  {proxy.base_url}{COUNTS_PATH}",
            "",
            "Press Ctrl-C to stop.",
        ]
        _print("\n".join(lines))
        await stopping.wait()
        _print(msgspec.json.format(msgspec.json.encode(proxy.counts)).decode())


def _stop_on_signals() -> asyncio.Event:
    """Return an event that Ctrl-C and SIGTERM set; a second one ends the process at once."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        stopping.set()
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, stop)
    return stopping


def _default_data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or home() / ".local" / "share") / "loops-local"


def _print_banner(local: LocalService, *, key_is_from_environment: bool) -> None:
    key = f'export BASETEN_API_KEY="$(cat {local.data_dir / "api_key"})"'
    lines = [
        f"Loops is running at {local.base_url}",
        f"  engine       {_ABOUT[local.engine]}",
        f"  models       {', '.join(local.models)}",
        f"  data         {local.data_dir}",
        f"  dashboard    {local.dashboard_url}",
        "",
        "Use it as the service:",
        f"  export LOOPS_BASE_URL={local.base_url}",
        "  # BASETEN_API_KEY is set already" if key_is_from_environment else f"  {key}",
        "",
        "Or without a control plane and a key, as ServiceClient.local(trainer_url=..., sampler_url=...):",
        f"  trainer_url  {local.trainer_url}",
        f"  sampler_url  {local.sampler_url}",
        "",
        "Press Ctrl-C to stop.",
    ]
    _print("\n".join(lines))


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - what the commands are for


def _fail(message: str) -> None:
    sys.exit(f"loops-local: {' '.join(message.split())}")


if __name__ == "__main__":
    main()
