"""The kinds of adapters that people share, by the names that their tensors and configurations bear.

Of PEFT 0.21.2, LyCORIS 4.1, kohya's scripts, diffusers 0.42, MLX and llama.cpp.  A name that is not here is shown as it
is.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

# PEFT's `peft_type`, and what people call it.
PEFT = {
    "LORA": "LoRA", "ADALORA": "AdaLoRA", "ADAMSS": "AdaMSS", "BOFT": "BOFT", "OFT": "OFT", "IA3": "IA3",
    "BEFT": "BEFT", "LILY": "Lily", "LOHA": "LoHa", "LOKR": "LoKr", "POLY": "Poly", "LN_TUNING": "LN tuning",
    "VERA": "VeRA", "FROD": "FroD", "PVERA": "PVeRA", "FOURIERFT": "FourierFT", "GLORA": "GLoRA", "XLORA": "X-LoRA",
    "HRA": "HRA", "VBLORA": "VB-LoRA", "UNILORA": "Uni-LoRA", "MISS": "MiSS", "BONE": "Bone", "RANDLORA": "RandLoRA",
    "ROAD": "RoAd", "TRAINABLE_TOKENS": "trainable tokens", "HIRA": "HiRA", "SHIRA": "SHiRA", "C3A": "C3A",
    "WAVEFT": "WaveFT", "OSF": "OSF", "DELORA": "DeLoRA", "GRALORA": "GraLoRA", "CARTRIDGE": "Cartridge",
    "TINYLORA": "TinyLoRA", "PSOFT": "PSOFT", "PEANUT": "PEANuT", "SHADOW": "Shadow", "SUPERTUNING": "SuperTuning",
    "DEFT": "DEFT", "PROMPT_TUNING": "prompt tuning", "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "P-tuning", "PREFIX_TUNING": "prefix tuning", "ADAPTION_PROMPT": "adaption prompt (LLaMA-Adapter)",
    "CPT": "CPT", "UNDULA": "undula",
}  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """What a tensor is, by the end of its name."""

    kind: str  # of the adapter that has such tensors
    rank: int | None = None  # which of its dimensions is the rank
    side: str = ""  # "A" (r, I), "B" (O, r), or both turned: "At" (I, r), "Bt" (r, O)


def _leaves(kind: str, names: str, rank: int | None = None, side: str = "") -> dict[str, Leaf]:
    return dict.fromkeys(names.split(), Leaf(kind, rank, side))


# By the last parts of a name (`weight` and an adapter's name behind them do not count).
LEAVES: dict[str, Leaf] = {
    **_leaves("LoRA", "lora_A lora_embedding_A lora_down lora.down lora_linear_layer.down", 0, "A"),
    **_leaves("LoRA", "lora_B lora_embedding_B lora_up lora.up lora_linear_layer.up", 1, "B"),
    **_leaves("LoRA", "lora_mid", 0),
    **_leaves("LoRA", "lora_a", 0, "A"),  # llama.cpp
    **_leaves("LoRA", "lora_b", 1, "B"),
    **_leaves("DoRA", "lora_magnitude_vector dora_scale"),
    **_leaves("LoRA with a bias", "lora_B.bias"),
    **_leaves("AdaLoRA", "lora_E", 0),
    **_leaves("AdaLoRA", "ranknum"),
    **_leaves("LoHa", "hada_w1_a hada_w2_a", 1, "B"),
    **_leaves("LoHa", "hada_w1_b hada_w2_b", 0, "A"),
    **_leaves("LoHa", "hada_t1 hada_t2", 0),
    **_leaves("LoKr", "lokr_w1 lokr_w2"),
    **_leaves("LoKr", "lokr_w1_a lokr_w2_a", 1),
    **_leaves("LoKr", "lokr_w1_b lokr_w2_b lokr_t2", 0),
    **_leaves("OFT", "oft_R oft_r oft_embedding_R oft_diag oft_blocks rescale"),
    **_leaves("BOFT", "boft_R boft_s"),
    **_leaves("IA3", "ia3_l on_input on_input.weight"),
    **_leaves("VeRA", "vera_lambda_b vera_lambda_d vera_A vera_B"),
    **_leaves("PVeRA", "pvera_lambda_b pvera_lambda_d pvera_A pvera_B"),
    **_leaves("VB-LoRA", "vblora_logits_A vblora_logits_B vblora_vector_bank vblora_logits_A_topk_indices"),
    **_leaves("RandLoRA", "randlora_lambda randlora_gamma randlora_A randlora_B"),
    **_leaves("FourierFT", "fourierft_spectrum"),
    **_leaves("WaveFT", "waveft_spectrum"),
    **_leaves("HRA", "hra_u", 1),
    **_leaves("HiRA", "hira_A hira_embedding_A", 0, "A"),
    **_leaves("HiRA", "hira_B hira_embedding_B", 1, "B"),
    **_leaves("MiSS", "miss_block", 0),
    **_leaves("Bone", "bone_block", 0),
    **_leaves("SHiRA", "shira_weight shira_indices"),
    **_leaves("C3A", "c3a_kernel"),
    **_leaves("RoAd", "road_theta road_alpha"),
    **_leaves("DeLoRA", "delora_A", 0, "A"),
    **_leaves("DeLoRA", "delora_B", 1, "B"),
    **_leaves("DeLoRA", "delora_lambda delora_w_norm"),
    **_leaves("GraLoRA", "gralora_A gralora_B gralora_A_general gralora_B_general"),
    **_leaves("GLoRA", "glora_A glora_B glora_C glora_D glora_E a1 a2 b1 b2 bm"),
    **_leaves("Poly", "poly_lora_A poly_lora_B poly_router.module_logits"),
    **_leaves("Uni-LoRA", "unilora_theta_d unilora_indices_A unilora_indices_B unilora_scales_A unilora_scales_B"),
    **_leaves("TinyLoRA", "tinylora_v tinylora_A tinylora_B tinylora_P"),
    **_leaves("LN tuning", "ln_tuning_layers"),
    **_leaves("trainable tokens", "trainable_tokens_delta"),
    **_leaves("adaption prompt (LLaMA-Adapter)", "adaption_prompt adaption_gate"),
    **_leaves("soft prompt", "prompt_embeddings prefix_task_cols prefix_task_rows"),
    **_leaves("full difference", "diff diff_b w_norm b_norm"),
    **_leaves("textual inversion", "emb_params string_to_param clip_l clip_g"),
    **_leaves("control vector", "direction"),
}  # fmt: skip
NUMBERS = ("alpha", "network_alpha", "scalar")  # tensors of one number beside a site's
SHORT = ("a1", "a2", "b1", "b2", "bm")  # of LyCORIS; as names of modules they are common, so all of the end must fit
OLD = re.compile(r"(?P<site>.+)\.processor\.(?P<layer>\w+?)_lora\.(?P<leaf>up|down)\.weight", re.DOTALL)
MORE = ("DoRA", "AdaLoRA", "LoRA with a bias")  # that a LoRA is by the tensors beside its pair, the first that fits
OWN_NAMES = {  # methods of undula that another kind's name means too
    "AdaLoRA": "AdaLoRA (an allocator)", "VeRA": "VeRA", "SHiRA": "SHiRA", "Uni-LoRA": "UniLoRA", "DoRA": "DoRA",
    "LoRA": "LoRA",
}  # fmt: skip


_ANY = "|".join(re.escape(name) for name in sorted(LEAVES, key=len, reverse=True) if name not in SHORT)
NAME = re.compile(
    r"(?:(?P<site>.*)\.)?(?:"
    rf"(?P<leaf>{_ANY})(?:\.default)?(?:\.weight)?"
    rf"|(?P<short>{'|'.join(SHORT)})\.weight|(?P<number>{'|'.join(NUMBERS)})|(?P<norm>ln_tuning_layers)\..*"
    r"|(?P<direction>direction)\.\d+)",
    re.DOTALL,
)


def of_name(name: str) -> tuple[str, str, Leaf | None]:
    """(site, leaf, what the leaf is) of a tensor's name; the whole name, "" and None for one that is not known."""
    old = OLD.fullmatch(name)
    if old is not None:
        return f"{old['site']}.{old['layer']}", f"lora.{old['leaf']}", LEAVES[f"lora.{old['leaf']}"]
    match = NAME.fullmatch(name)
    if match is None:
        return name, "", None
    leaf = next(v for k, v in match.groupdict().items() if k != "site" and v is not None)
    return match["site"] or "", leaf, LEAVES.get(leaf, Leaf(""))


def paired(name: str, names: Container[str]) -> str:
    """A name as `of_name` understands it, with those beside it: LyCORIS calls IA3's numbers `weight`."""
    site = name.removesuffix(".weight")
    return f"{site}.on_input.weight" if site != name and f"{site}.on_input" in names else name
