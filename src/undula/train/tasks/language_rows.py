"""Rows for a language model: which columns make which form of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..data.columns import named_columns, texts
from ..data.conversation import conversations, questions
from ..data.faults import Faults
from .format import Format, check_talks
from .task import Task

if TYPE_CHECKING:
    from datasets import Dataset


class LanguageRows(Task):
    """A task whose rows have one of several forms: pairs, conversations, plain texts."""

    roles: ClassVar = {
        "prompt": ("prompt", "instruction", "text"),
        "completion": ("completion", "summary", "response", "output"),
        "context": ("context", "input"),
        "messages": ("messages", "conversations"),
        "text": ("text",),
    }
    forms: ClassVar[Mapping[str, tuple[str, ...]]] = {  # their roles; the first that fits
        "conversations": ("messages",),
        "pairs": ("prompt", "completion"),
        "texts": ("text",),
    }
    optional = ("context",)
    targets: ClassVar[tuple[str, ...]] = ("completion",)

    form: str | None  # of `forms`, where the columns allow several
    format: Format | None

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in self.forms:
            raise LookupError(f"rows have no form {self.form!r}; there are: {shown_forms(self)}")

    def columns(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        """{role: column} of one of the forms: the one that is named, else the first that the columns allow."""
        named = [form for form in self.forms.values() if any(getattr(self, role) is not None for role in form)]
        met = [f for f in self.forms.values() if all(any(c in there for c in self.roles[role]) for role in f)]
        asked = [] if self.form is None else [self.forms[self.form]]
        form: tuple[str, ...] = (*asked, *named, *met, ())[0]
        found = faults if faults is not None else Faults()
        if len({*named, *asked}) > 1:
            found.missing(
                f"{' and '.join('+'.join(f) for f in dict.fromkeys((*asked, *named)))} are different forms of rows",
                "Name columns of one",
            )
        if not form:
            found.missing(
                f"the data have no columns for a language model; their columns are: {named_columns(there)}",
                f"Rows have one of these forms: {shown_forms(self)}. Name the columns: --column prompt=... --column "
                "completion=..., --column messages=... or --column text=..., in Python CausalLM(prompt=..., "
                "completion=...)",
            )
        roles = (*form, "context") if form == ("prompt", "completion") else form
        made = self._columns(roles, there, found)
        if faults is None:
            found.check()
        return made

    def reads(self, there: Sequence[str]) -> str:
        found = self.columns(there)
        name = next(name for name, roles in self.forms.items() if roles[0] in found)
        return f"{name}: {super().reads(there)}"

    def check(self, split: Dataset, faults: Faults) -> None:
        for role, column in self.columns(split.column_names, faults).items():
            if role == "messages":
                conversations(split, column, faults)
            else:
                texts(split, column, faults, blank=role == "context")

    def rows(self, split: Dataset) -> Dataset:
        from datasets import Dataset

        columns, faults = self.columns(split.column_names), Faults()
        if "messages" in columns:
            check_talks(self.format)
            made: dict[str, Any] = {"messages": conversations(split, columns["messages"], faults)}
        else:
            made = {r: texts(split, column, faults, blank=r == "context") for r, column in columns.items()}
        faults.check()
        return Dataset.from_dict(_joined(made))

    def inputs(self, there: Sequence[str], faults: Faults | None = None) -> dict[str, str]:
        """{role: column} of a form without its completion: the one that is named, else the first that there is."""
        forms = [tuple(role for role in form if role not in self.targets) for form in self.forms.values()]
        named = [form for form in forms if any(getattr(self, role) is not None for role in form)]
        met = [form for form in forms if all(any(c in there for c in self.roles[role]) for role in form)]
        form = (*named, *met, ("prompt",))[0]
        return self._columns((*form, "context") if form == ("prompt",) else form, there, faults)

    def asked(self, split: Dataset, faults: Faults) -> Dataset:
        from datasets import Dataset

        columns = self.inputs(split.column_names, faults)
        if "messages" in columns:
            return Dataset.from_dict({"messages": questions(split, columns["messages"], faults)})
        return Dataset.from_dict(_joined({r: texts(split, c, faults, r == "context") for r, c in columns.items()}))


def _joined(made: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """A context follows its prompt."""
    columns = dict(made)
    if "context" in columns:
        asked = zip(columns["prompt"], columns.pop("context"), strict=True)
        columns["prompt"] = [f"{prompt}\n\n{context}" if context.strip() else prompt for prompt, context in asked]
    return columns


def shown_forms(task: LanguageRows | type[LanguageRows]) -> str:
    """The forms that rows may have, with the names of their columns."""
    named = {name: " and ".join("/".join(task.roles[role]) for role in roles) for name, roles in task.forms.items()}
    return "; ".join(f"{name} ({columns})" for name, columns in named.items())
