"""The command `distaff serve`: answers requests for the outputs of a model over HTTP.

Functions import what needs JAX, so that the help starts without it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from distaff.cli.inference import Run
from distaff.core import optional
from distaff.errors import ConfigError
from distaff.serve.options import ServeOptions

if TYPE_CHECKING:
    from distaff.serve import ServedModel


def serve(
    run: Run,
    code: str | None = None,
    weights: str | None = None,
    *,
    options: Annotated[ServeOptions, tyro.conf.arg(name="")] = ServeOptions(),  # noqa: B008
) -> int:
    """Serves the best model of a run, or an exported model, over HTTP until Ctrl-C or SIGTERM.

    Args:
        run: path of a run, such as runs/digits/0001, of a checkpoint, or of an exported folder.
        code: file or module with your classes, such as train.py or package.module.
        weights: "raw", "ema" or "swa"; by default those that the monitor judges.
        options: address, batches and limits.
    """
    from distaff.serve import Application

    server = optional.load("deployment.uvicorn", extra="serve")
    with _bound(options.host, options.port) as bound:
        model = _model(run, code, weights, options.max_batch_size)
        application = Application(model, options)

        def announce() -> None:
            host, port = bound.getsockname()[:2]
            print(f"serving {run} at http://{f'[{host}]' if ':' in host else host}:{port}")
            for kind, forms in (("input", model.inputs), ("output", model.outputs)):
                for name, form in forms.items():
                    print(f"  {kind:<7} {name}: {form}")
            print("Press Ctrl-C to stop.", flush=True)

        return server.run(application, bound, options.timeout, announce)


def main(words: Sequence[str]) -> int:
    """Runs `distaff serve` with these arguments; returns the exit status.

    Raises:
        DistaffError: there is no such model, or the address cannot be used.
    """
    return tyro.cli(serve, prog="distaff serve", args=list(words))


def _model(path: Path, code: str | None, weights: str | None, max_batch_size: int) -> ServedModel:
    from distaff.checkpoint import located
    from distaff.checkpoint.record import example_from
    from distaff.cli import trained
    from distaff.serve import ServedModel

    if (path / "model.jax").is_file():
        if code is not None or weights is not None:
            raise ConfigError("An exported model has its own code and weights: omit both options.")
        return ServedModel.read(path, max_batch_size=max_batch_size)
    trainer = trained.loaded(path, code)
    example = example_from(located(path).record()["example_batch"])
    return ServedModel.of(trainer, example, max_batch_size=max_batch_size, weights=weights)


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, and does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"The address {host}:{port} cannot be used: {error}. Pass another --host or --port; "
            "port 0 takes a free one."
        ) from error
    return bound
