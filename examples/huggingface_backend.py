"""The backend on a Hugging Face model: nothing to import, nothing to change in the model.

python examples/huggingface_backend.py
"""

from __future__ import annotations

import torch
import transformers
from torch import nn

import fxopt


def tiny_llama() -> nn.Module:
    """Llama with random weights: rotary embedding, grouped-query attention (4 query heads on 2), RMSNorm, SwiGLU."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.eval()


def main(base: str = "inductor", lengths: tuple[int, ...] = (24, 40, 57)) -> fxopt.Report:
    """Compare logits with eager's at several lengths and return the report; ``base`` runs the rest of the graph."""
    model = tiny_llama()
    fast = torch.compile(model, backend="fxopt", options={"base": base})
    with torch.no_grad():
        for length in lengths:
            tokens_BS = torch.randint(512, (2, length))
            expected = model(input_ids=tokens_BS, use_cache=False).logits
            logits = fast(input_ids=tokens_BS, use_cache=False).logits
            torch.testing.assert_close(logits, expected)
            print(f"length {length}: logits differ by at most {(logits - expected).abs().max():.1e}")
        report = fxopt.explain(model, input_ids=tokens_BS, use_cache=False)
    print(f"\n{report}")
    return report


if __name__ == "__main__":
    main()
