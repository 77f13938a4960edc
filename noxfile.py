"""The same checks as the Makefile, over interpreters: `nox -s tests-3.12`."""

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "tests"]


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    session.install("-r", "requirements-dev.txt")
    session.install("--no-deps", "-e", ".")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports", "--no-cache")


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The built wheel, not the working tree: the layout cannot hide a missing file."""
    session.install("-r", "requirements-dev.txt")
    session.install("--no-deps", ".")
    session.run("pytest", "tests", "-m", "not real and not browser", *session.posargs)


@nox.session(python="3.11")
def real(session: nox.Session) -> None:
    session.install("-r", "requirements-dev.txt")
    session.install("--no-deps", "-e", ".")
    session.run("pytest", "tests", "-m", "real", *session.posargs)
