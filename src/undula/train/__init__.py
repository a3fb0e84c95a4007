"""Training on `transformers.Trainer`: `undula.train(undula.Run(...))` does it, the rest is imported from here."""

from .fit import Interrupted, train
from .forgetting import forget
from .load import load
from .look import Look, look
from .prepared import Prepared, prepare
from .recipe import Recipe
from .restored import Restored, dense, evaluate, restored
from .run import Run
from .tasks.causal_lm import CausalLM, Chat, Format, Plain
from .tasks.classification import Classification, Regression
from .tasks.described import DescribedClassification
from .tasks.image_classification import ImageClassification
from .tasks.multi_label import MultiLabel
from .tasks.preference import Preference
from .tasks.seq2seq import Seq2Seq
from .tasks.similarity import Similarity
from .tasks.speech_recognition import SpeechRecognition
from .tasks.task import Examples, Task
from .tasks.token_classification import TokenClassification
from .tasks.transcripts import Normaliser, Spoken
from .tuning import Tuned, tune

__all__ = [
    "CausalLM",
    "Chat",
    "Classification",
    "DescribedClassification",
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
    "Tuned",
    "dense",
    "evaluate",
    "forget",
    "load",
    "look",
    "prepare",
    "restored",
    "train",
    "tune",
]
