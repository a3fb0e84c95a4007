"""The names of a UNet's layers in Stability's own layout (`input_blocks.4.1 ...`), in which kohya's scripts write SDXL.

A down block of n resnets takes n + 1 numbers of input_blocks, the last one for its downsampler; an up block as many of
output_blocks as it has resnets.  Behind a number 0 is the resnet, 1 the attention, and the last the upsampler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

INPUT, OUTPUT, MIDDLE = "input_blocks", "output_blocks", "middle_block"
ENDS = {
    "conv_in": f"{INPUT}.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
PLACE = re.compile(r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\."
                   r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)")  # fmt: skip


def stability(layers: Iterable[str]) -> dict[str, str]:
    """{name of diffusers: name of Stability} of the layers of a UNet, all of which have to be given: their numbers are
    counted.  What Stability has no name for is left out."""
    found = {name: PLACE.fullmatch(name) for name in layers}
    places = {name: match for name, match in found.items() if match is not None}
    first = {side: _first(side, places.values()) for side in ("down", "up")}
    attending = {m["block"] for m in places.values() if m["side"] == "up" and m["kind"] == "attentions"}
    made = {name: ENDS[name] for name in found if name in ENDS}
    for name, match in places.items():
        inner = _inner(match, attending)
        if inner is None:
            continue
        if match["side"] is None:
            at = 2 * int(match["number"]) if match["kind"] == "resnets" else 1
            made[name] = f"{MIDDLE}.{at}.{inner}"
            continue
        own = first[match["side"]][int(match["block"])]
        last = match["kind"] in ("downsamplers", "upsamplers")
        at = own[1] if last else own[0] + int(match["number"])
        made[name] = f"{INPUT if match['side'] == 'down' else OUTPUT}.{at}.{inner}"
    return made


def _first(side: str, places: Iterable[re.Match[str]]) -> dict[int, tuple[int, int]]:
    """{block: (the number of its first layer, that of its down- or upsampler)}."""
    counts: dict[int, int] = {}
    for match in places:
        if match["side"] == side and match["kind"] == "resnets":
            block = int(match["block"])
            counts[block] = max(counts.get(block, 0), int(match["number"]) + 1)
    made: dict[int, tuple[int, int]] = {}
    at = 1 if side == "down" else 0
    for block in range(max(counts, default=-1) + 1):
        n = counts.get(block, 0)
        made[block] = (at, at + n if side == "down" else at + n - 1)
        at += n + 1 if side == "down" else n
    return made


def _inner(match: re.Match[str], attending: set[str]) -> str | None:
    """The name below a number; None where Stability has none."""
    kind, rest = match["kind"], match["rest"]
    outer = "" if match["side"] is None else {"resnets": "0.", "attentions": "1.", "downsamplers": "0."}.get(kind, "")
    if kind == "resnets":
        return f"{outer}{RESNET[rest]}" if rest in RESNET else None
    if kind == "attentions":
        return f"{outer}{rest}"
    if rest != "conv":
        return None
    return "0.op" if kind == "downsamplers" else f"{2 if match['block'] in attending else 1}.conv"
