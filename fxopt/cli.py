"""The command line: ``python -m fxopt passes | explain | dump | bench``, also installed as ``fxopt``.

Exit codes: 0 done; 1 the model or a rewrite failed; 2 wrong usage (target, pass or option). Results go to standard
output, and whatever the model prints to standard error, so that ``--json`` can be piped.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxopt.errors import FxoptError, OptionError, TargetError, UnknownPassError

if TYPE_CHECKING:
    from fxopt.target import Target

app = typer.Typer(
    name="fxopt",
    help="Show, dump and time what fxopt does with a model. TARGET is module:factory or path/to/file.py:factory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_TARGET = typer.Argument(
    metavar="TARGET",
    help="module:factory or file.py:factory; factory() returns (model, args), (model, args, kwargs) or a model with "
    "example_inputs.",
)
_JSON = typer.Option("--json", help="Print JSON instead of text.")
_TRAIN = typer.Option("--train", help="Put the model into training mode (default: evaluation).")

TargetArgument = Annotated[str, _TARGET]
JsonOption = Annotated[bool, _JSON]
TrainOption = Annotated[bool, _TRAIN]


@app.command()
def passes(as_json: JsonOption = False) -> None:
    """List the passes: name, tier and what each does."""
    with _reported():
        import fxopt.passes  # noqa: F401 - registers the passes that come with fxopt
        from fxopt.rewriter.registry import registered_passes

        known = registered_passes()
    entries = [
        {"name": name, "tier": str(known[name].tier), "summary": _summary(known[name])} for name in sorted(known)
    ]
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    width = max(len(entry["name"]) for entry in entries)
    for entry in entries:
        typer.echo(f"{entry['name']:{width}}  {entry['tier']:11}  {entry['summary']}")


@app.command(short_help="List every site of a model and what became of it.")
def explain(
    target: TargetArgument,
    as_json: JsonOption = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the report as a page to this file.")] = None,
    names: Annotated[
        list[str] | None, typer.Option("--pass", metavar="NAME", help="Run these passes only, in this order.")
    ] = None,
    train: TrainOption = False,
) -> None:
    """List every attention, norm and MLP of the model: rewritten into what, or kept and why."""
    with _reported():
        program = _capture(target, train)
        import fxopt

        with contextlib.redirect_stdout(sys.stderr):
            report = fxopt.explain_program(program, passes=names or None)
        if html is not None:
            _save(report, html)
    typer.echo(report.to_json() if as_json else str(report))


@app.command(short_help="Write every step as runnable files.")
def dump(
    target: TargetArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory, or an earlier dump.")],
    train: TrainOption = False,
) -> None:
    """Write the program before and after every pass as runnable files, with diffs, kernels and the report."""
    with _reported():
        program = _capture(target, train)
        with contextlib.redirect_stdout(sys.stderr):
            program.dump(directory)
    typer.echo(str(directory))


@app.command(short_help="Time eager, Inductor and fxopt in turn.")
def bench(
    target: TargetArgument,
    as_json: JsonOption = False,
    inductor: Annotated[bool, typer.Option("--inductor", help="Time torch.compile's own backend as well.")] = False,
    rounds: Annotated[int, typer.Option(min=3, max=1000, help="Samples of each candidate.")] = 20,
) -> None:
    """Time one inference call in turn: eager, Inductor if wanted, fxopt. Medians with the 10th and 90th percentile."""
    with _reported(), contextlib.redirect_stdout(sys.stderr):
        from fxopt.bench import bench_target

        result = bench_target(_load(target, train=False), inductor=inductor, rounds=rounds)
    typer.echo(json.dumps({"target": target, **result.as_json()}, indent=2) if as_json else str(result))


def _load(target: str, train: bool) -> Target:
    from fxopt.target import load_target

    with contextlib.redirect_stdout(sys.stderr):
        loaded = load_target(target)
        loaded.set_mode(train)
    return loaded


def _capture(target: str, train: bool) -> Any:
    loaded = _load(target, train)
    import fxopt

    with contextlib.redirect_stdout(sys.stderr):
        return fxopt.capture(loaded.model, loaded.args, loaded.kwargs)


def _save(report: Any, path: Path) -> None:
    try:
        report.save_html(path)
    except OSError as error:
        raise OptionError(f"--html {path} can't be written: {error}") from error


def _summary(pass_class: type[Any]) -> str:
    """The first sentence line of a pass's documentation."""
    lines = (pass_class.__doc__ or "").strip().splitlines()
    return lines[0].strip() if lines else ""


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Errors as one message on standard error and an exit code, without a traceback."""
    try:
        yield
    except (OptionError, TargetError, UnknownPassError) as error:
        _fail(error, 2)
    except FxoptError as error:
        _fail(error, 1)


def _fail(error: FxoptError, code: int) -> None:
    typer.echo(f"fxopt: {error}", err=True)
    raise typer.Exit(code) from error


def main() -> None:
    """Entry point of the console script and of ``python -m fxopt``."""
    app(prog_name="fxopt")
