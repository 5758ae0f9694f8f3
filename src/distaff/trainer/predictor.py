"""Predictor: a model and its state, and what they are good for without any training."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import jax

from distaff import checkpoint
from distaff.checkpoint import Located
from distaff.checkpoint.record import example_from
from distaff.checkpoint.weights import export_weights
from distaff.checkpoint.weights.names import as_variables
from distaff.core.config.options import with_options
from distaff.core.seeds import folded
from distaff.core.typing import Batch, Key, Params, PyTree
from distaff.data import as_loader, entry, num_batches
from distaff.data.on_policy import check_reader
from distaff.errors import CheckpointError
from distaff.execution import allocator, compile_cache
from distaff.models import LoraModel, Variables, as_model
from distaff.run.display import make_display
from distaff.run.display.model_table import model_table
from distaff.run.evaluation import predict
from distaff.run.workspace import Workspace
from distaff.step.context import Context
from distaff.step.state import TrainState
from distaff.trainer.config import TrainerConfig, make_config
from distaff.trainer.constructor import call_of, made_again, recorded_options
from distaff.trainer.initial import normalized, on_host, rows_of

T = TypeVar("T")

_INPUT_NAMES = ("image", "images", "x", "input", "inputs", "tokens", "features")


class Predictor:
    """A model with its state: it is initialised, bound, asked for predictions, and loaded.

    Args:
        model: a module of Flax Linen, Flax NNX or Equinox, a function that makes one, or a pair
            `(init, apply)`; see `distaff.models.as_model`.
        **options: see `TrainerConfig`.
    """

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    state_class: ClassVar[type[TrainState]] = TrainState

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Gives the class the signature that editors and `help` show, with each option by name."""
        super().__init_subclass__(**arguments)
        cls.__signature__ = with_options(cls.__init__, cls.Config)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Notes how the constructor is called, which a run records; see `constructor`."""
        self = super().__new__(cls)
        self._made_by = call_of(cls, args, kwargs)
        return self

    def __init__(self, model: Any, **options: Any) -> None:
        self._made_by = self._made_by and self._made_by.with_model(model)
        self.config = make_config(self.Config, options, type(self))
        self.model = as_model(model)
        if self.config.tune_process:
            compile_cache.enable()
        self._workspace = self._new_workspace()

    def _new_workspace(self) -> Workspace:
        def predict_step(state: TrainState, batch: Batch) -> PyTree:
            return self.predict_fn(state.params, batch, Context(state, train=False))

        return Workspace(self.config, make_display(self.config.enable_progress_bar), predict_step)

    @property
    def state(self) -> TrainState | None:
        """The state: parameters, optimizer, random key; None before the model is initialised.

        Raises:
            StateError: a loader that is read ahead asks for it, or one asks before it is there.
        """
        state = self._workspace.state
        check_reader(is_there=state is not None)
        return state

    @state.setter
    def state(self, state: TrainState | None) -> None:
        self._workspace.state = state

    @property
    def step(self) -> int:
        """Completed optimizer updates of the state."""
        check_reader(is_there=True)
        return self._workspace.step

    @property
    def epoch(self) -> int:
        """Completed epochs of the state, or the one that is trained."""
        return self._workspace.epoch

    def _set_up(self, example_batch: Batch) -> None:
        """Calls the initialising methods in their order."""
        self.init_model(example_batch)

    def _tune_process(self, example_batch: Batch) -> None:
        """Tunes the process for what the model needs; called before JAX makes its first array.

        Args:
            example_batch: a batch like those of training.
        """

        def forward(variables: Variables, key: Key, batch: Batch) -> Any:
            return self.model.apply(variables, *self.model_inputs(batch), train=True, key=key)

        def num_bytes() -> int:
            key = jax.eval_shape(jax.random.key, 0)
            variables = jax.eval_shape(self.run_model_init, example_batch, key)
            return allocator.made_bytes(forward, variables, key, example_batch)

        if self.config.tune_process:
            allocator.tune(num_bytes)

    def print_tabulate(self, example_batch: Batch) -> None:
        """Shows the model as a table, which is also written into the run directory.

        Args:
            example_batch: a batch like those of training; outputs and FLOPs are for one like it.
        """
        kind = type(self.model.module).__name__
        key = jax.eval_shape(jax.random.key, 0)
        try:
            rows = self.model.layers(key, *self.model_inputs(example_batch))
        except Exception:  # It has other inputs, or computes on the host: `run_model_init` decides.
            rows = rows_of(self._initial(example_batch, jax.random.key(0)), kind)
        self._workspace.table = model_table(rows, kind, depth=self.config.table_depth)
        self._workspace.display.print(self._workspace.table)

    def init_model(self, example_batch: Batch) -> None:
        """Makes the state before training: variables and root key, no optimizer yet."""
        init_key, root_key = self._workspace.execution.once(_two_keys)(folded(self.config.seed))
        variables = self._initial(example_batch, init_key)
        self.state = self.state_class.create(
            apply_fn=self.model.apply_fn, rng=root_key, **variables._asdict()
        )

    def _initial(self, example_batch: Batch, key: Key) -> Variables:
        return normalized(self.run_model_init(example_batch, key))

    def run_model_init(self, example_batch: Batch, key: Key) -> Variables:
        """Returns the model's initial variables. Override it for a model with other arguments.

        What it returns may be a dict of collections, too, as `module.init` of Flax Linen makes it.
        An initializer that computes with NumPy runs on the host, outside of any program.

        Args:
            example_batch: a batch like those of training.
            key: source of the initial parameters; a model that was passed with its parameters
                keeps them.
        """
        ready = self.model.ready(key)
        if ready is not None:
            return ready

        def init(key: Key, batch: Batch) -> Variables:
            return self.model.init(key, *self.model_inputs(batch))

        return on_host(init, self._workspace.execution.once(init), key, example_batch)

    def model_inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Returns what of a batch the model is called with. Override it for other batches.

        By default the entry `image`, `images`, `x`, `input`, `inputs`, `tokens` or `features` of a
        dict or dataclass, the first item of a tuple or list, or the batch itself if it is an array.

        Args:
            batch: a batch, each leaf `[batch, ...]`.

        Returns:
            The positional arguments of the model's forward pass.

        Raises:
            BatchError: none of these is there.
        """
        if hasattr(batch, "shape"):
            return (batch,)
        what, override = "The model's input", "model_inputs(self, batch)"
        return (entry(batch, _INPUT_NAMES, 0, what=what, override=override),)

    def predict_fn(self, params: Params, batch: Batch, ctx: Context) -> PyTree:
        """Returns the outputs for a batch, each `[batch, ...]`. Override it to predict otherwise.

        Args:
            params: the model's parameters.
            batch: a batch; labels are not needed.
            ctx: as in `loss_fn`, with `ctx.train` False.
        """
        return ctx.apply(params, *self.model_inputs(batch))

    def predict(self, loader: Any) -> PyTree:
        """Gathers the outputs of `predict_fn` over all examples of a loader.

        Args:
            loader: any iterable of batches; it stays where it is, see `TrainerModule.eval_model`.

        Returns:
            NumPy arrays `[examples, ...]`, in the structure of one batch's outputs.

        Raises:
            StateError: the model has no parameters yet.
            BatchError: the loader is empty, or an output has no batch axis.
        """
        batches = self._pass(loader, "predict")
        here = self._workspace
        return predict(here.predict_step, self.evaluation_state(), batches, here.execution)

    def bind_model(self) -> Any:
        """Returns the model with its variables inside, in the form of its kind.

        Returns:
            `bound(x, train=False)` for Flax Linen; a live module `bound(x)` for Flax NNX; for
            Equinox the module, which takes one example, or `(module, state)`; for functions
            `bound(x)`.

        Raises:
            StateError: the model has no parameters yet.
        """
        return self.model.bind(as_variables(self.evaluation_state()))

    def tracker(
        self, iterable: Iterable[T], *, description: str, total: int | None = None
    ) -> Iterator[T]:
        """Wraps an evaluation or a prediction, to show how far it is.

        Args:
            iterable: what is gone through.
            description: what is done, such as `"val"`.
            total: number of items, where it is known.
        """
        return self._workspace.display.track(iterable, description, total)

    @classmethod
    def load_from_checkpoint(
        cls, path: str | Path, model: Any = None, *, example_batch: Batch = None, **options: Any
    ) -> Self:
        """Loads a trained model, ready for `predict`, `eval_model` and `bind_model`.

        The folder is only read, and nothing is imported by a name that it holds.

        Args:
            path: a run directory (its best checkpoint is taken, else its newest), or one
                checkpoint folder. It may have been moved.
            model: the model as the trainer was given it. A Linen module may be left out if its
                class is imported, or be given as its class: it is rebuilt from the record.
            example_batch: a batch like those of training; needed where batches are of a class of
                your own and `model_inputs` is overridden: what is recorded of them is a dict.
            **options: options of the trainer that shall differ from the recorded ones; nothing is
                drawn unless `enable_progress_bar=True` is among them. Arguments of a constructor of
                your own are recorded, too, if they are plain values, dataclasses, or functions of
                modules; the error names others, which are passed here.

        Raises:
            CheckpointError: nothing whole is there, or it is of another model.
            ConfigError: `model` is none.
        """
        if options.get("tune_process", True):
            allocator.tune()  # before the checkpoint is looked at, which starts JAX
        found = checkpoint.located(path)
        file, record = found.origin, found.record()
        is_recorded = example_batch is None
        if example_batch is None:
            example_batch = example_from(record["example_batch"])
        with _explained(file):
            recorded = {**recorded_options(cls.Config, record), "enable_progress_bar": False}
        trainer = made_again(cls, record, model, recorded, options)
        if not trainer.config.enable_progress_bar or "enable_progress_bar" not in options:
            # Whatever a constructor of its own asks for.
            trainer._workspace.display = make_display(False)
        with _explained(file):
            trainer._set_up(example_batch)
        _load(trainer, found, record if is_recorded else None, file)
        return trainer

    def load_weights(self, path: str | Path) -> None:
        """Loads what a model needs from a checkpoint of another run; see `load_from_checkpoint`.

        Args:
            path: a run directory (its best checkpoint is taken, else its newest), or one
                checkpoint folder.

        Raises:
            StateError: the model has no parameters yet.
            CheckpointError: nothing whole is there, or it is of another model.
        """
        found = checkpoint.located(path)
        here = self._workspace
        here.restore(found.store, found.step, _trained(here.ready_state()))

    def export_weights(
        self, path: str | Path, *, only: str | Sequence[str] = "*", merge: bool = True
    ) -> Path:
        """Writes the model's arrays as a safetensors file; see `distaff.export_weights`.

        Args:
            path: the file, which ends in `.safetensors`.
            only: shell patterns for the names to write.
            merge: whether the kernels of a `Lora` get their updates, so that the file is of an
                ordinary model; else its base and the updates are apart:
                `only=("*/lora_a", "*/lora_b")` for the updates alone.

        Returns:
            The absolute path of the file.

        Raises:
            StateError: the model has no parameters yet.
            CheckpointError: the file cannot be written.
        """
        variables = as_variables(self.evaluation_state())
        if merge and isinstance(self.model, LoraModel):
            variables = self.model.merged(variables)
        return export_weights(path, variables, only=only)

    def evaluation_state(self) -> TrainState:
        """Returns the state with the parameters to evaluate with; see `optim.evaluation_params`.

        Returns:
            For most optimizers the state itself.

        Raises:
            StateError: there is none yet.
        """
        return self._workspace.evaluation_state()

    def _pass(self, loader: Any, name: str) -> Iterator[Batch]:
        """Goes once through the examples of a loader, in their order, with its progress shown."""
        feeds = self._workspace.feeds
        with feeds.one_pass(as_loader(loader, name=name), name) as view:
            total, batches = num_batches(view), feeds.batches(view, name)
            yield from self.tracker(batches, description=name, total=total)


def _load(trainer: Predictor, found: Located, record: Mapping[str, Any] | None, file: Path) -> None:
    """Loads what a model needs of a run's checkpoint.

    Args:
        trainer: set up for a batch of one example, where `record` is given.
        found: the checkpoint.
        record: of the run, whose batch it was set up for; None for a batch that was passed.
        file: the record's.
    """
    here = trainer._workspace
    try:
        here.restore(found.store, found.step, _trained(here.ready_state()))
    except CheckpointError:
        if record is None or not here.ready_state().collections:
            raise
        # A variable may have the size of the batch, such as the carry of an RNN.
        with _explained(file):
            trainer._set_up(example_from(record["example_batch"], whole=True))
        here.restore(found.store, found.step, _trained(here.ready_state()))


def _two_keys(seed: Any) -> tuple[Key, Key]:
    first, second = jax.random.split(jax.random.key(seed))
    return first, second


def _trained(state: TrainState) -> list[str]:
    """Returns the members that a loaded model needs: all but the optimizer's and the guard's.

    A subclass may fill a member of its own only when training starts, as the optimizer's state is.
    """
    members = state.arrays()
    always = ("step", "params", "batch_stats", "collections", "rng")
    return [
        name
        for name, value in members.items()
        if name in always or (name not in ("opt_state", "guard") and value is not None)
    ]


@contextmanager
def _explained(file: Path) -> Generator[None]:
    """Turns what a wrong record leads to into an error that names the record."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The trainer cannot be set up as {file} records it: {error} "
            "Pass what differs to load_from_checkpoint: model, example_batch, or an option."
        ) from error
