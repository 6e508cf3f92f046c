"""Where models and problem sets come from, and the shape that a model must have."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from milepost.configuration.rewards import Reward
from milepost.configuration.section import EachOnce, NonNegative, Section, Share


class Source(Section):
    """Where files come from: a Hub repository at a revision, a local folder, or this pipeline itself."""

    repo: str | None = Field(None, description="repository on the Hub, e.g. Qwen/Qwen3.5-9B")
    revision: str = Field("main", description="branch, tag or commit; resolved once to a commit, which is recorded")
    folder: str | None = Field(None, description="a local folder with the same files, instead of the Hub")

    places: ClassVar[tuple[str, ...]] = ("repo", "folder")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [name for name in self.places if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(self.places)}; given: {', '.join(given) or 'none'}")
        return self


class WarmUp(Section):
    """The supervised training that a tiny model starts with: afterwards it can add, but often only estimates."""

    steps: Annotated[int, Field(ge=0)] = Field(750, description="optimizer steps; 0 leaves the random weights")
    batch_size: PositiveInt = Field(8, description="examples per step")
    learning_rate: NonNegative = Field(1.5e-3, description="Adam's learning rate")
    computed_share: Share = Field(
        0.4, description="share of the last examples that work the sum out, and so about the accuracy to begin with"
    )


class TinyModel(Section):
    """A small Qwen3.5 of the same architecture, made by this pipeline."""

    kind: Literal["dense", "moe"] = Field(description="dense like 9B, or a mixture of experts like 35B-A3B")
    seed: int = Field(0, description="seed of the initial weights and of the warm-up's examples")
    layers: Annotated[int, Field(gt=0, multiple_of=4)] = Field(
        4, description="number of layers; every fourth uses full attention, the others linear attention"
    )
    hidden: Annotated[int, Field(gt=0, multiple_of=64)] = Field(128, description="hidden size")
    head_dim: Annotated[int, Field(gt=0, multiple_of=16)] = Field(
        32, description="size of a head, of full and of linear attention"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="how the weights are stored, before training and after; as training.dtype none is rounded",
    )
    warm_up: WarmUp = Field(WarmUp(), description="supervised training of the initial weights")


class ModelSource(Source):
    """Where a model's starting weights come from."""

    places = ("repo", "folder", "tiny")
    tiny: TinyModel | None = Field(None, description="make a tiny model instead of downloading one")

    @property
    def script(self) -> str:
        """The entry script that fetches or makes it."""
        return "make_tiny" if self.tiny else "download"


class Problems(Section):
    """A problem set made by this pipeline: sums of two numbers. The two splits never share a problem."""

    split: Literal["train", "evaluation"] = Field(description="which of the two disjoint sets of problems to draw from")
    seed: int = Field(0, description="seed of the draw")
    rows: PositiveInt = Field(description="number of problems")


class Choices(Section):
    """Where a row has the choices of a multiple-choice question. They are shuffled, each question on its own."""

    right: str = Field(description="key of the right choice")
    wrong: Annotated[list[str], EachOnce] = Field(
        min_length=1, description="keys of the wrong choices, each of one choice or of a list of them"
    )
    seed: int = Field(0, description="seed of the shuffle")


def _value_or_values(wanted: Any) -> Any:
    values = wanted if isinstance(wanted, list) else [wanted]
    if not values or not all(isinstance(value, bool | int | float | str) for value in values):
        raise ValueError("text, a number, true or false is expected, or a list of these")
    return wanted


Value = bool | int | float | str
Filter = dict[str, Annotated[Value | list[Value], BeforeValidator(_value_or_values)]]
COUNT_OR_SLICE = "a number of rows is expected, or a slice like 0:5000, 5000: or :5000"


def _count_or_slice(rows: int | str) -> int | str:
    """A positive number, or a slice: ``start:end``, of which one may be left out."""
    if isinstance(rows, int):
        valid = rows > 0
    else:
        start, colon, end = rows.partition(":")
        digits = all(part.isdecimal() for part in (start, end) if part)
        valid = bool(colon) and digits and bool(start or end) and (not end or int(start or 0) < int(end))
    if not valid:
        raise ValueError(COUNT_OR_SLICE)
    return rows


class Dataset(Source):
    """Where a problem set comes from, and how its rows read."""

    places = ("repo", "folder", "problems")
    problems: Problems | None = Field(None, description="make a problem set instead of downloading one")
    file: str | list[str] | None = Field(
        None,
        description="its file, or files, within the source: names or patterns like data/train-*.parquet, read in the"
        " order of their names; .jsonl, .json, .parquet, .csv or .tsv, each also with .gz",
    )
    subset: str | None = Field(None, description="instead of `file`: the subset (configuration) of a Hub data set")
    split: str | None = Field(None, description="instead of `file`: the split, such as train or test")
    prompt_key: str = Field(
        "prompt",
        description="key of a row's prompt: a chat that ends with the user's message, or plain text; dots step into"
        " objects and lists: `data.prompt`, `turns.0`",
    )
    label_key: str = Field(
        "label",
        description="key of a row's answer, text or a number, such as `reward_model.ground_truth`; a reward of your own"
        " may need none",
    )
    label_after: str | None = Field(
        None, min_length=1, description="the answer is what follows the last of this text in the label, such as ####"
    )
    choices: Choices | None = Field(
        None, description="for multiple choice: ask with lettered choices; the label is the letter of the right one"
    )
    system: str | None = Field(
        None, min_length=1, description="system message; a chat that has one of its own keeps that instead"
    )
    instruction: str | None = Field(
        None,
        description="added to every prompt; where the reward reads boxes, only to those that do not ask for a \\boxed"
        " answer themselves",
    )
    filter: Filter = Field(
        {}, description="use only rows with this value, or one of these, at each key: {level: [4, 5], source: aime}"
    )
    reward: Reward | None = Field(None, description="grades this set's responses, in place of the model's")
    rows: Annotated[int | str, AfterValidator(_count_or_slice)] | None = Field(
        None,
        description="the number of rows that the set must have, or a slice of them: 0:5000 (the first 5000), 5000:;"
        " both are of the rows that pass the filter",
    )
    unique_prompts: bool = Field(False, description="refuse the set if a prompt repeats")
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="share of bad rows up to which a training set is used without them, and above which refused"
    )

    @model_validator(mode="after")
    def _files_are_named_once(self) -> Self:
        if self.file is not None and (self.split or self.subset):
            raise ValueError("file and split (or subset) exclude each other: give the file, or let the split name it")
        if self.file == []:
            raise ValueError("file is an empty list: name at least one")
        if self.problems and not isinstance(self.file, str):
            raise ValueError("file is missing: name the file that the made problems are written to, like sums.jsonl")
        return self

    @model_validator(mode="after")
    def _one_label(self) -> Self:
        if self.choices and (self.label_key != "label" or self.label_after is not None):
            raise ValueError("choices give the label: leave out label_key and label_after")
        return self

    @property
    def row_count(self) -> int | None:
        """The number of usable rows that there must be; None if any will do."""
        return self.rows if isinstance(self.rows, int) else None

    @property
    def row_slice(self) -> tuple[int, int | None]:
        """Of the rows that pass the filter, the first to use, from 0, and the one after the last (None: all)."""
        start, _, end = (self.rows if isinstance(self.rows, str) else ":").partition(":")
        return int(start or 0), int(end) if end else None

    @property
    def script(self) -> str:
        """The entry script that fetches or makes it."""
        return "make_problems" if self.problems else "download"


class Architecture(Section):
    """The shape that a checkpoint must have. The numbers that build the model come from its own config.json."""

    layers: PositiveInt = Field(description="number of layers, without the MTP layer")
    hidden: PositiveInt = Field(description="hidden size")
    ffn: PositiveInt = Field(description="width of the MLP, or of one expert in a mixture of experts")
    attention_heads: PositiveInt = Field(description="query heads of full attention")
    key_value_groups: PositiveInt = Field(description="key-value heads of full attention")
    head_dim: PositiveInt = Field(description="size of a head of full attention")
    linear_key_heads: PositiveInt = Field(description="key heads of linear attention (Gated DeltaNet)")
    linear_value_heads: PositiveInt = Field(description="value heads of linear attention")
    linear_head_dim: PositiveInt = Field(description="size of a key or value head of linear attention")
    tied_embeddings: bool = Field(description="whether the output layer shares the embedding's weights")
    vocabulary: PositiveInt = Field(248320, description="rows of the embedding")
    experts: PositiveInt | None = Field(None, description="routed experts per layer; none in a dense model")
    experts_per_token: Annotated[int, Field(ge=2)] | None = Field(
        None, description="routed experts that each token is sent to"
    )
    shared_expert_ffn: PositiveInt | None = Field(None, description="width of the expert that sees every token")

    @model_validator(mode="after")
    def _experts_are_whole(self) -> Self:
        of_experts = (self.experts, self.experts_per_token, self.shared_expert_ffn)
        if None in of_experts and of_experts != (None, None, None):
            raise ValueError("experts, experts_per_token and shared_expert_ffn belong together: give all or none")
        return self
