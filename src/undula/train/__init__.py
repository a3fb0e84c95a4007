"""Training on `transformers.Trainer`: `undula.train(undula.Run(...))` does it, the rest is imported from here."""

from .causal_lm import CausalLM, Chat, Format, Plain
from .classification import Classification, Regression
from .fit import Interrupted, Prepared, prepare, train
from .image_classification import ImageClassification
from .load import load
from .look import Look, look
from .multi_label import MultiLabel
from .preference import Preference
from .recipe import Recipe
from .restored import Restored, dense, evaluate, restored
from .run import Run
from .seq2seq import Seq2Seq
from .similarity import Similarity
from .speech_recognition import SpeechRecognition
from .task import Examples, Task
from .token_classification import TokenClassification
from .transcripts import Normaliser, Spoken

__all__ = [
    "CausalLM",
    "Chat",
    "Classification",
    "Examples",
    "Format",
    "ImageClassification",
    "Interrupted",
    "Look",
    "MultiLabel",
    "Normaliser",
    "Plain",
    "Preference",
    "Prepared",
    "Recipe",
    "Regression",
    "Restored",
    "Run",
    "Seq2Seq",
    "Similarity",
    "SpeechRecognition",
    "Spoken",
    "Task",
    "TokenClassification",
    "dense",
    "evaluate",
    "load",
    "look",
    "prepare",
    "restored",
    "train",
]
