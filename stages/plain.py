"""Run one stage as a plain program: `python -m stages.<name>`, or under torchrun, without Ray.

The same `run(config, inputs, context)` as in a pipeline; instead of a record it leaves `artifact.json`
in the output folder, which the next stage takes as `--input name=FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from cluster import storage
from cluster.errors import AlreadyExists, ConfigError, DataInvalid, ItpnError
from cluster.resources import Resources
from stages.artifacts import Artifact, Outcome, parse_artifact
from stages.config import Config, parse_assignments
from stages.context import StageContext


def main(config_class: type[Config], run: Callable[..., Outcome], *, stage: str, example: str) -> None:
    """Parse the command line, run the stage, write `artifact.json`, print the artifact; exits with the error's code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=(sys.modules[run.__module__].__doc__ or stage).splitlines()[0],
        epilog="example:\n  " + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="URI", help="output folder")
    parser.add_argument("--config", metavar="FILE", help="JSON file with config values")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a config value"
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=URI",
        help="output folder of an earlier stage, or a file of weights",
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="processes (default 1; under torchrun its world size)"
    )
    parser.add_argument("--show-config", action="store_true", help="print the config and stop")
    arguments = parser.parse_args()
    try:
        config = config_class.from_values(_read_config(arguments.config), parse_assignments(arguments.set))
        if arguments.show_config:
            print(json.dumps(config.model_dump(mode="json"), indent=2))
            return
        world = int(os.environ.get("WORLD_SIZE", arguments.workers or 1))
        context = StageContext(
            out=storage.join(arguments.out),
            attempt=_attempt(world),
            resources=Resources(workers=world),
        )
        inputs = {
            name: _read_artifact(name, uri)
            for name, uri in parse_assignments(arguments.input, flag="--input").items()
        }
        outcome = run(config, inputs, context)
        if int(os.environ.get("RANK", 0)) == 0:
            _finish(context.out, outcome)
        code = 0
    except ItpnError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from cluster import distributed

        distributed.leave(code)
    if code:
        sys.exit(code)


def _attempt(world: int) -> str:
    """An id that is unique to this try and the same on every rank."""
    own = uuid.uuid4().hex[:12]
    if world == 1 or "RANK" not in os.environ:
        return own
    from cluster import distributed

    distributed.init()
    return distributed.broadcast_object(own)


def _read_config(path: str | None) -> dict:
    if path is None:
        return {}
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config file {path} cannot be read", found=error, remedy="give a JSON file"
        ) from None


def _read_artifact(name: str, uri: str) -> Artifact:
    for mark in ("record.json", "artifact.json"):
        where = storage.join(storage.join(uri), mark)
        if storage.exists(where):
            return parse_artifact(storage.read_json(where)["artifact"])
    from stages.adopt.outside import examine, weights_file

    if weights := weights_file(uri):
        return examine(weights).reference()
    raise DataInvalid(
        f"input '{name}' is not a finished output",
        expected=f"record.json or artifact.json under {uri}, or a file of weights",
        remedy="name the output folder of a stage that has finished, or a weights file (.safetensors, .pth, …)",
    )


def _finish(out: str, outcome: Outcome) -> None:
    text = outcome.model_dump(mode="json")
    uri = storage.join(out, "artifact.json")
    try:
        storage.write_json_exclusive(uri, text)
    except AlreadyExists:
        print(f"{uri} was there already and stays as it is", file=sys.stderr)
    print(json.dumps(text["artifact"]))
