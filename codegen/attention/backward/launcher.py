"""The host side of a generated backward: allocation, launches, and the part that runs when the file is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fxopt.codegen.attention.backward.config import band_config, table_config
from fxopt.codegen.attention.backward.plan import Flow
from fxopt.codegen.attention.backward.totals import Total
from fxopt.codegen.attention.dropout import SEED_MEANING, Dropout
from fxopt.codegen.attention.portable.config import Config, padded
from fxopt.codegen.attention.portable.phases import allocate as allocate_phases
from fxopt.codegen.attention.portable.phases import launch as launch_phases
from fxopt.codegen.attention.portable.tiles import wide
from fxopt.codegen.template import listing

if TYPE_CHECKING:
    from fxopt.codegen.attention.backward.source import BackwardText

LAUNCH: Final = '''
def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    into: Sequence[torch.Tensor] = (),
    $seed_parameter
) -> list[torch.Tensor]:
    """The gradients of q, k, v$returned, from the forward's out and lse and the gradients of those.

    q, dq [B, H, Sq, $head_dim]; k, dk [B, G, Sk, $head_dim]; v, dv [B, G, Sk, $value_dim];
    out, dout [B, H, Sq, $value_dim]; lse, dlse [B, H, Sq] in float32.
    into: where dq, dk and dv are written, if not to memory of their own; their last axis is dense.
    $seed_meaning
    """
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    $unpack_captures
    if into:
        dq, dk, dv = into
    else:
        $allocate
    if min(batch, heads, rows, keys) == 0:
        $nothing
    lse = lse if lse.is_contiguous() else lse.contiguous()
    delta = torch.empty($row_shape, dtype=torch.float32, device=q.device)
    with_dlse = dlse is not None
    if with_dlse and not (dlse.dtype == torch.float32 and dlse.is_contiguous()):
        dlse = dlse.float().contiguous()
    dlse = dlse if with_dlse else delta
    $statistics
    # Strides so long that offsets within a block need 64 bits.
    $wide
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    tensors = (
        $tensors
    )
    strides = (
        $strides
    )
    sizes = ($sizes)
    switches = {
        "GROUP": heads // kv_heads,
        "BLOCK_D": $block_d,
        "BLOCK_E": $block_e,
        "PRECISION": "ieee" if exact else "tf32",
        "FAST_TANH": q.is_cuda and q.dtype != torch.float32,
        "WIDE": wide,
        "WITH_DLSE": with_dlse,
    }
    with torch.cuda.device_of(q):
        $launches
    return $results

'''

MAIN: Final = '''
def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor] = ()$reference_seed
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward in plain PyTorch, in float64: the result and the log-sum-exp."""
    q, k, v = q.double(), k.double(), v.double()
    head = torch.arange(q.shape[1], device=q.device)
    served = $served
    s = q @ k[:, served].transpose(-2, -1)
    $reference_symbols
    x = $reference_score
    x = torch.as_tensor(x, dtype=s.dtype, device=s.device).expand_as(s)
    $reference_mask
    $reference_drop
    out = $reference_weights @ v[:, served]
    out = $reference_result
    return out, torch.logsumexp(x, -1)


def main() -> None:
    """Check against autograd in float64 on a small case, then time a large one."""
    for batch, length in ((2, 257), (4, 2048)):
        q = torch.randn(batch, 8, length, $head_dim, device="cuda", dtype=torch.$dtype, requires_grad=True)
        k = torch.randn(batch, 4, length, $head_dim, device="cuda", dtype=torch.$dtype, requires_grad=True)
        v = torch.randn(batch, 4, length, $value_dim, device="cuda", dtype=torch.$dtype, requires_grad=True)
        $main_captures
        leaves = [q, k, v$wanted_captures]
        $draw_seed
        out, lse = $forward
        dout = torch.randn_like(out, dtype=q.dtype)
        given = (q, k, v, captures, out.detach().to(q.dtype), lse.detach().float(), dout)
        if length < 1000:
            expected = torch.autograd.grad(out, leaves, dout.double())
            found = launch(*given$seeded)
            error = max((x.double() - y).abs().max().item() for x, y in zip(found, expected, strict=True))
            print(f"largest error against float64: {error:.3g}")
        else:
            milliseconds = triton.testing.do_bench(lambda: launch(*given$seeded))
            print(f"{batch} x 8 heads x {length}: {milliseconds:.3f} ms")


if __name__ == "__main__":
    main()
'''

_ALLOCATE: Final = {
    "bhsd": "{0} = torch.empty((batch, {1}, {2}, {3}), dtype={4}.dtype, device=q.device)",
    "bshd": "{0} = torch.empty((batch, {2}, {1}, {3}), dtype={4}.dtype, device=q.device).transpose(1, 2)",
}

_PER_ROW: Final = "{0} = torch.empty({1}, dtype=torch.float32, device=q.device)"
#: The gradient of what nothing depends on.
_ZEROS: Final = "torch.zeros({0}.shape, dtype={0}.dtype, device=q.device)"


def launch_holes(text: BackwardText) -> dict[str, str]:
    """The holes of the host side."""
    names = [f"c{n}" for n in range(len(text.spec.captures))]
    wanted = [n for n, want in enumerate(text.wanted) if want]
    known = {total.flow.name: total.result for total in totals(text)}
    results = ["dq", "dk", "dv", *(known.get(f"c{n}", _ZEROS.format(f"c{n}")) for n in wanted)]
    shown = "".join(f"c{n}, " for n in wanted)
    zeros = f"\n    *(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in ({shown.strip()})),"
    empty = zeros if wanted else ""
    dropout = Dropout(text.spec)
    return {
        "seed_parameter": "*,\nseed: torch.Tensor," if dropout else "",
        "seed_meaning": SEED_MEANING if dropout else "",
        "returned": "".join(f", c{n}" for n in wanted),
        "unpack_captures": f"({names[0]},) = captures" if len(names) == 1 else _unpacked(names),
        "allocate": _allocated(text),
        "nothing": f"return [\n    *(x.zero_() for x in (dq, dk, dv)),{empty}\n]",
        "row_shape": text.row_shape,
        "statistics": _statistics(text),
        "wide": wide(text.reaches),
        "tensors": listing(text.arguments),
        "strides": listing(text.strides.values()),
        "sizes": ", ".join("1" if size == "parts" else size for size in text.sizes.values()),
        "block_d": str(padded(text.head_dim)),
        "block_e": str(padded(text.value_dim)),
        "launches": "\n".join(line for line in _launches(text) if line),
        "results": f"[{', '.join(results)}]",
    }


def _unpacked(names: list[str]) -> str:
    return f"{', '.join(names)} = captures" if names else ""


def _allocated(text: BackwardText) -> str:
    layout = _ALLOCATE[text.spec.out_layout]
    return "\n".join((
        layout.format("dq", "heads", "rows", text.head_dim, "q"),
        layout.format("dk", "kv_heads", "keys", text.head_dim, "k"),
        layout.format("dv", "kv_heads", "keys", text.value_dim, "v"),
    ))  # fmt: skip


def _statistics(text: BackwardText) -> str:
    lines = [_PER_ROW.format(name, text.row_shape) for name in text.statistics[1:]]
    blocks = f"batch, heads, -(-rows // {text.config.rows.block_m})"
    if text.spoils:
        lines.append(f"spoilt = torch.empty(({blocks}), dtype=torch.float32, device=q.device)")
    if text.averages:
        width = padded(text.value_dim)
        lines.append(f"shares = torch.empty(({blocks}, {width}), dtype=torch.float32, device=q.device)")
    config = text.config
    keys = max(cut.block_n for cut in (config.keys, config.rows, band_config(config)))
    lines += [found.allocate for found in text.lists or ()]
    return "\n".join((*lines, *(total.allocate for total in totals(text)), allocate_phases(text.bands, keys))).rstrip()


def totals(text: BackwardText) -> tuple[Total, ...]:
    """What becomes of the gradients of the captured tensors."""
    return tuple(Total(flow, _blocks(flow, text), text.config.rows.block_m) for flow in text.flows)


def _blocks(flow: Flow, text: BackwardText) -> Config:
    """The blocks of the kernel that computes the gradient of one captured tensor."""
    return band_config(text.config) if flow.side == "band" else table_config(text.config)


def _launches(text: BackwardText) -> list[str]:
    rows, keys = text.config.rows, text.config.keys
    lines = [
        prepare_text(text),
        _launch("dkdv", keys, f"-(-keys // {keys.block_n}) * batch * kv_heads", "rows", keys.block_m),
        _launch("dq", rows, f"-(-rows // {rows.block_m}) * batch * heads", "keys", rows.block_n),
    ]
    for flow in (flow for flow in text.flows if flow.side in ("table", "band")):
        config = _blocks(flow, text)
        grid = f"{flow.name}_programs * {flow.name}_parts"
        launch = _launch(flow.name, config, grid, "keys", config.block_n)
        lines.append(launch.replace("*sizes,", f"*sizes[:-1], {flow.name}_parts,"))
    return [
        launch_phases(text.bands),
        *(found.launch for found in text.lists or ()),
        *lines,
        *(total.launch for total in totals(text)),
    ]


def prepare_text(text: BackwardText) -> str:
    """The launch of the kernel that computes delta."""
    rows = text.config.rows
    prepare = Config(rows.block_m, rows.block_n, rows.num_warps if text.recounted else 4, 1)
    return _launch("prepare", prepare, f"-(-rows // {rows.block_m}) * batch * heads", "keys", prepare.block_n)


def _launch(kernel: str, config: Config, grid: str, length: str, block: int) -> str:
    limit = f", maxnreg={config.registers}" if config.registers else ""
    return "\n".join((
        f"{kernel}_kernel[({grid},)](",
        "    *tensors, *strides, *sizes,",
        f"    BLOCK_M={config.block_m}, BLOCK_N={config.block_n}, EVEN={length} % {block} == 0, **switches,",
        f"    num_warps={config.num_warps}, num_stages={config.num_stages}{limit},",
        ")",
    ))  # fmt: skip
