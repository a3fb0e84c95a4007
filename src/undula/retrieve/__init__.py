"""Adapters found by what they are for: an index over a folder, by descriptions and by weights.

index = retrieve.update("adapters")                              # only what is new or changed is read
best = retrieve.find("sort reviews by mood", "adapters", top=3)
undula.combine.fused([undula.Adapter.load(f.path) for f in best])   # gates that train on a few rows
"""

from .encoder import Encoder, learn
from .entry import Entry
from .finding import Found, find, learned, question, ranked
from .index import Index, load, update
from .sketching import Sketch, likeness, sketch
from .texts import embedded, of_rows

__all__ = ["Encoder", "Entry", "Found", "Index", "Sketch", "embedded", "find", "learn", "learned", "likeness", "load",
           "of_rows", "question", "ranked", "sketch", "update"]  # fmt: skip
