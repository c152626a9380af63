"""What may differ between a checkpoint and the run that goes on from it.

Nothing that the numbers depend on, unless `--allow-changed KEY,…` accepts it. Then the run goes on with the next step
and the next sample, under the new values, and the checkpoints that follow say since when:

- *steps* are counted on, so that schedules and intervals of logging and saving stay where they are;
- *samples* are counted on, also with another batch size: no sample is lost or comes twice for that;
- under another seed, list of shards, `lanes` or `shuffle_window` the sequence is another one, entered at the same
  number: what of the present epoch comes twice or not at all is chance, and later epochs are whole again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clip_train.config.load import differences, parse_toml
from clip_train.config.schema import Recipe
from clip_train.data.stream import Stream
from clip_train.errors import CheckpointError, ConfigError
from clip_train.training.checkpoint import Checkpoint, State

Changes = dict[str, tuple[Any, Any]]
"""Recipe keys, with their old and new values."""

# What the numbers do not depend on; and the length of the run, which is said aloud.
FREE = (
    "name",
    "description",
    "logging.",
    "evaluation.",
    "checkpoint.",
    "faults.",
    "data.workers",
    "data.threads",
    "data.cache_decoded",
    "data.cache_decoded_gib",
    "data.cache_dir",
    "data.cache_gib",
    "data.max_bad_fraction",
    "tokenizer.path",  # its fingerprint is compared instead
    "training.micro_batch",
    "training.compile",
    "training.activation_checkpointing",
    "training.parallel.",
    "training.steps",
    "training.epochs",
    "training.init",  # what the first step started from; a checkpoint goes on from itself
    "training.init_text",
    "training.init_image",
)
CHANGEABLE = ("data", "training", "optimizer", "schedule", "loss", "preprocess")
"""Sections that `--allow-changed` may name; the weights fit no other towers and no other vocabulary."""

SHARDS = "data.sources"
"""Stands for the shards' contents, too."""


def accepted_changes(
    recipe: Recipe,
    checkpoint: Checkpoint,
    stream: Stream,
    tokenizer_fingerprint: str,
    allow: Sequence[str],
    notify: Callable[[str], Any],
) -> Changes:
    """What differs and is accepted.

    Raises:
        CheckpointError: something else differs; with the differences, and what would accept them.
        ConfigError: `allow` names what cannot be changed.
    """
    if wrong := [key for key in allow if key.partition(".")[0] not in CHANGEABLE or key == "optimizer.kind"]:
        raise ConfigError(
            f"--allow-changed {', '.join(wrong)}: cannot be changed under a checkpoint. What can is a key, or a table "
            f"of keys, of {', '.join(CHANGEABLE)}, for example data.batch_size,optimizer"
        )
    changed = _differences(recipe, checkpoint)
    for key in ("training.steps", "training.epochs"):
        if key in changed:
            before, now = changed[key]
            notify(f"{key} changes from {before} to {now}: learning rates follow the new length from here on")
    changed = _that_count(changed, checkpoint, stream)
    accepted = {key: values for key, values in changed.items() if any(_accepts(one, key) for one in allow)}
    refused = {key: values for key, values in changed.items() if key not in accepted}
    lines = [f"{key}: {before!r} in the checkpoint, {now!r} now" for key, (before, now) in refused.items()]
    if SHARDS in refused:
        lines.append("the shards hold other samples than those the checkpoint was trained on")
    if checkpoint.state.tokenizer_fingerprint != tokenizer_fingerprint:
        lines.append("tokenizer.path is another vocabulary")
    if lines:
        raise CheckpointError(
            f"{checkpoint.path} is of another run: {'; '.join(lines)}. Give these values again, or start afresh with "
            f"another --run-dir{_advice(refused, checkpoint.state)}"
        )
    if accepted:
        changes = "; ".join(f"{key} {before!r} → {now!r}" for key, (before, now) in accepted.items())
        notify(f"accepted: {changes}. Going on with step {checkpoint.state.step + 1} {_samples(checkpoint.state)}")
    return accepted


def origin_after(recipe: Recipe, checkpoint: Checkpoint, stream: Stream) -> tuple[int, int]:
    """`Order.origin` of a run of this recipe that goes on from a checkpoint, what differs being accepted."""
    changed = _that_count(_differences(recipe, checkpoint), checkpoint, stream)
    return with_changes(checkpoint.state, changed).origin


def with_changes(state: State, changed: Mapping[str, tuple[Any, Any]]) -> State:
    """The state from which a run goes on: where something changed, that is written down and samples are counted from
    here.
    """
    if not changed:
        return state
    entry = {"step": state.step, "samples": state.samples, "changed": {key: list(one) for key, one in changed.items()}}
    return replace(state, origin=(state.step, state.samples), changes=[*state.changes, entry])


def changes_between(changes: Sequence[Mapping[str, Any]], first: int, last: int) -> dict[str, Any]:
    """What changed at steps `first` to `last` (exclusive): for the line of metrics that speaks of the steps after."""
    return {key: values for one in changes if first <= one["step"] < last for key, values in one["changed"].items()}


def _differences(recipe: Recipe, checkpoint: Checkpoint) -> Changes:
    return differences(parse_toml(checkpoint.recipe_toml, where=str(checkpoint.path / "recipe.toml")), recipe)


def _that_count(changed: Changes, checkpoint: Checkpoint, stream: Stream) -> Changes:
    """Without what is free to change; with the shards' contents."""
    changed = {key: values for key, values in changed.items() if not any(_covers(free, key) for free in FREE)}
    other_shards = {key for key in changed if key.startswith(SHARDS) and key.endswith(".shards")}
    same_data = (checkpoint.state.data_fingerprint, checkpoint.state.sources) == (stream.fingerprint, stream.contents)
    if same_data:  # the same samples lie elsewhere
        changed = {key: values for key, values in changed.items() if key not in other_shards}
    elif not other_shards:
        changed[SHARDS] = (checkpoint.state.sources, stream.contents)
    return changed


def _advice(refused: Mapping[str, Any], state: State) -> str:
    keys = [key for key in refused if key.partition(".")[0] in CHANGEABLE and key != "optimizer.kind"]
    if len(keys) < len(refused) or not keys:
        return ""
    return (
        f", or accept them with --allow-changed {','.join(keys)}: the run then goes on with step {state.step + 1} "
        f"{_samples(state)} under the new values"
    )


def _samples(state: State) -> str:
    return f"after {state.samples:,} samples"


def _covers(free: str, key: str) -> bool:
    return key == free or (free.endswith(".") and key.startswith(free))


def _accepts(allowed: str, key: str) -> bool:
    return (key == allowed or key.startswith(f"{allowed}.")) and key != "optimizer.kind"
