"""`Predictor`: a model with its state, for initialization, prediction and loading."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import jax

import distaff.checkpoint as checkpoint
from distaff.checkpoint.record import example_from
from distaff.checkpoint.weights import (
    TorchRules,
    as_rules,
    export_torch_weights,
    export_weights,
)
from distaff.checkpoint.weights.names import as_variables
from distaff.core.config.options import with_options
from distaff.core.typing import Batch, Key, Params, PyTree
from distaff.core.views import html
from distaff.core.views.brief import brief, fields_table, num_values
from distaff.data import INPUT_NAMES, entry, num_batches
from distaff.data.on_policy import check_reader
from distaff.distributed.joining import check_joined
from distaff.execution import allocator, compile_cache
from distaff.execution.determinism import ask_backend
from distaff.mesh import simulate
from distaff.models import LoraModel, Variables, as_model
from distaff.models.standardized import initial_inputs
from distaff.run.display import as_text, make_display
from distaff.run.display.model_table import model_table
from distaff.run.evaluation import predict
from distaff.run.workspace import Workspace
from distaff.step.context import Context
from distaff.step.state import TrainState
from distaff.trainer.config import TrainerConfig, make_config
from distaff.trainer.constructor import call_of, rebuild_trainer, recorded_options
from distaff.trainer.initial import initial_state, normalized, on_host, rows_of, traced_init
from distaff.trainer.loading import explained, load, restore

T = TypeVar("T")


class Predictor:
    """A model with its state, without training.

    Args:
        model: a Flax Linen, Flax NNX or Equinox module, a function that returns one, or a pair
            `(init, apply)`; see `distaff.models.as_model`.
        **options: fields of `TrainerConfig`.
    """

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    state_class: ClassVar[type[TrainState]] = TrainState

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Sets the signature that editors and `help` show, with every option by name."""
        super().__init_subclass__(**arguments)
        cls.__signature__ = with_options(cls.__init__, cls.Config)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Records the arguments of the constructor; see `distaff.trainer.constructor`."""
        self = super().__new__(cls)
        self._made_by = call_of(cls, args, kwargs)
        return self

    def __init__(self, model: Any, **options: Any) -> None:
        self._made_by = self._made_by and self._made_by.with_model(model)
        self.config = make_config(self.Config, options, type(self))
        self.model = as_model(model)
        if self.config.deterministic:
            ask_backend()
        check_joined()
        allocator.ignore_compilers()
        simulate(self.config)
        if self.config.tune_process:
            compile_cache.enable()
        self._workspace = self._new_workspace()

    def _new_workspace(self) -> Workspace:
        def predict_step(state: TrainState, batch: Batch) -> PyTree:
            return self.predict_fn(state.params, batch, Context(state, train=False))

        return Workspace(self.config, make_display(self.config.enable_progress_bar), predict_step)

    @property
    def state(self) -> TrainState | None:
        """The parameters, optimizer state and random key; None before the model is initialized.

        Raises:
            StateError: a loader reads the state while it is prefetched, or before the state exists.
        """
        state = self._workspace.state
        check_reader(exists=state is not None)
        return state

    @state.setter
    def state(self, state: TrainState | None) -> None:
        self._workspace.state = state

    @property
    def step(self) -> int:
        """Number of completed optimizer updates of the state."""
        check_reader(exists=True)
        return self._workspace.step

    @property
    def epoch(self) -> int:
        """Number of completed epochs; during training, the current epoch."""
        return self._workspace.epoch

    def _set_up(self, example_batch: Batch) -> None:
        self.init_model(example_batch)

    def _tune_process(self, example_batch: Batch) -> None:
        """Configures the memory allocator for the size of the model, before JAX is first used."""

        def forward(variables: Variables, key: Key, batch: Batch) -> Any:
            return self.model.apply(variables, *self.model_inputs(batch), train=True, key=key)

        def num_bytes() -> int:
            key = jax.eval_shape(jax.random.key, 0)
            variables = jax.eval_shape(self.run_model_init, example_batch, key)
            return allocator.made_bytes(forward, variables, key, example_batch)

        if self.config.tune_process:
            allocator.tune(num_bytes)

    def __repr__(self) -> str:
        if "_workspace" not in vars(self):  # before its constructor has ended
            return object.__repr__(self)
        here, kind = self._workspace, type(self.model.module).__name__
        if here.state is None:
            return brief(self, kind, "no parameters yet")
        size = f"{num_values(here.state.params):,} parameters"
        return brief(self, kind, size, f"step {here.step}", f"epoch {here.epoch}")

    def _repr_html_(self) -> str:
        table = self._workspace.table
        model = "" if table is None else html.details("model", html.preformatted(as_text(table)))
        options = html.details("options", fields_table(self.config))
        return f"{html.preformatted(repr(self))}{model}{options}"

    def print_tabulate(self, example_batch: Batch) -> None:
        """Prints a table of the model, which is also written to the run directory.

        Args:
            example_batch: a batch like the training batches; outputs and FLOPs are for its size.
        """
        kind = type(self.model.module).__name__
        key = jax.eval_shape(jax.random.key, 0)
        try:
            rows = self.model.layers(key, *self._initial_inputs(example_batch))
        except Exception:  # It has other inputs, or computes on the host: `run_model_init` decides.
            rows = rows_of(self._initial(example_batch, jax.random.key(0)), kind)
        depth = self.config.table_depth
        self._workspace.table = model_table(rows, kind, None if depth == "auto" else depth)
        self._workspace.display.print(model_table(rows, kind, depth))

    def init_model(self, example_batch: Batch) -> None:
        """Creates the initial state: the variables and the root key, without an optimizer."""
        self.state = initial_state(self, example_batch)

    def _initial(self, example_batch: Batch, key: Key) -> Variables:
        return normalized(self.run_model_init(example_batch, key))

    def run_model_init(self, example_batch: Batch, key: Key) -> Variables:
        """Returns the initial variables. Override it for a model with other arguments.

        May also return a dict of collections, as `module.init` of Flax Linen does. An initializer
        that uses NumPy is run on the host, outside of `jax.jit`.

        Args:
            example_batch: a batch like the training batches.
            key: random key `[]` for the initial parameters; a model that already has parameters
                keeps them.
        """
        ready = self.model.ready(key)
        if ready is not None:
            return ready

        def init(key: Key, batch: Batch) -> Variables:
            return self.model.init(key, *self._initial_inputs(batch))

        return on_host(init, self._workspace.execution.once(init), key, example_batch)

    def _initial_inputs(self, batch: Batch) -> tuple[Any, ...]:
        return initial_inputs(self.model_inputs(batch), self.config.standardize)

    def model_inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Returns the inputs of the model for a batch. Override it for other batches.

        By default this is the entry `image`, `images`, `x`, `input`, `inputs`, `tokens` or
        `features` of a dict or dataclass, the first item of a tuple or list, or an array itself.

        Args:
            batch: a batch, each leaf `[batch, ...]`.

        Returns:
            The positional arguments of the model's forward pass.

        Raises:
            BatchError: the batch has no such entry.
        """
        if hasattr(batch, "shape"):
            return (batch,)
        what, override = "The model's input", "model_inputs(self, batch)"
        return (entry(batch, INPUT_NAMES, 0, what=what, override=override),)

    def predict_fn(self, params: Params, batch: Batch, ctx: Context) -> PyTree:
        """Returns the outputs for a batch, each `[batch, ...]`. Override it for other outputs.

        Args:
            params: the model's parameters.
            batch: a batch; labels are not needed.
            ctx: the same as in `loss_fn`, with `ctx.train` False.
        """
        return ctx.apply(params, *self.model_inputs(batch))

    def predict(self, loader: Any, *, weights: str | None = None) -> PyTree:
        """Returns the outputs of `predict_fn` for all examples of a loader.

        Args:
            loader: any iterable of batches, arrays, or a data frame; it does not move.
            weights: see `evaluation_state`.

        Returns:
            NumPy arrays `[examples, ...]` in the structure of the outputs of one batch.

        Raises:
            StateError: the model has no parameters yet, or does not have this average.
            BatchError: the loader is empty, or an output has no batch axis.
        """
        batches = self._pass(loader, "predict")
        here = self._workspace
        return predict(here.predict_step, self.evaluation_state(weights), batches, here.execution)

    def bind_model(self, *, weights: str | None = None) -> Any:
        """Returns the model with its variables, ready to call.

        Args:
            weights: see `evaluation_state`.

        Returns:
            For Flax Linen `bound(x, train=False)`; for Flax NNX a live module `bound(x)`; for
            Equinox the module, which takes one example, or `(module, state)`; for functions
            `bound(x)`.

        Raises:
            StateError: the model has no parameters yet, or does not have this average.
        """
        return self.model.bind(as_variables(self.evaluation_state(weights)))

    def tracker(
        self, iterable: Iterable[T], *, description: str, total: int | None = None
    ) -> Iterator[T]:
        """Wraps an iterable to show the progress of an evaluation or prediction.

        Args:
            iterable: the items to yield.
            description: the label to show, such as `"val"`.
            total: number of items; None if unknown.
        """
        return self._workspace.display.track(iterable, description, total)

    @classmethod
    def load_from_checkpoint(
        cls, path: str | Path, model: Any = None, *, example_batch: Batch = None, **options: Any
    ) -> Self:
        """Loads a trained model, ready for `predict`, `eval_model` and `bind_model`.

        The folder is opened read-only, and may have been moved. No module is imported.

        Args:
            path: a run directory (its best checkpoint, else its newest) or one checkpoint folder.
            model: the model as passed to the trainer. Optional for a Linen module whose class is
                already imported: it is rebuilt from the record. You can also pass the class.
            example_batch: a batch like the training batches. Required if your batches are
                instances of your own class and you override `model_inputs`.
            **options: options to change from their recorded values; nothing is displayed unless
                `enable_progress_bar=True`. Pass arguments of your own constructor here if they
                were not recorded: the error names them. Recorded are plain values, dataclasses
                and functions of modules. `mesh` is not restored: without it, the model is on one
                device.

        Raises:
            CheckpointError: there is no complete checkpoint, or it belongs to another model.
            ConfigError: `model` is not a supported model.
        """
        if options.get("tune_process", True):
            allocator.tune()  # before the checkpoint is looked at, which starts JAX
        found = checkpoint.located(path)
        file, record = found.origin, found.record()
        is_recorded = example_batch is None
        if example_batch is None:
            example_batch = example_from(record["example_batch"])
        with explained(file):
            recorded = {**recorded_options(cls.Config, record), "enable_progress_bar": False}
        trainer = rebuild_trainer(cls, record, model, recorded, options)
        if not trainer.config.enable_progress_bar or "enable_progress_bar" not in options:
            # Overrides the display of a custom constructor.
            trainer._workspace.display = make_display(False)
        with explained(file):
            trainer._set_up(example_batch)
        load(trainer._workspace, found, record if is_recorded else None, trainer._set_up)
        return trainer

    def load_weights(self, path: str | Path) -> None:
        """Loads the weights and other model state from a checkpoint of another run.

        Args:
            path: a run directory (its best checkpoint, else its newest) or one checkpoint folder.

        Raises:
            StateError: the model has no parameters yet.
            CheckpointError: there is no complete checkpoint, or it belongs to another model.
        """
        found = checkpoint.located(path)
        restore(self._workspace, found)

    def export_weights(
        self,
        path: str | Path,
        *,
        only: str | Sequence[str] = "*",
        merge: bool = True,
        weights: str | None = None,
        rules: Literal["torch"] | TorchRules | None = None,
    ) -> Path:
        """Writes the model's arrays to a safetensors file; see `distaff.export_weights`.

        Args:
            path: a file name ending in `.safetensors`.
            only: shell patterns for the names to write.
            merge: whether to merge the updates of a `Lora` into its kernels, which makes the file
                an ordinary model. If False, base and updates are separate arrays; export the
                updates alone with `only=("*/lora_a", "*/lora_b")`.
            weights: see `evaluation_state`.
            rules: "torch" or a `TorchRules` to write what PyTorch's `load_state_dict` takes. A
                `Lora` is then always merged.

        Returns:
            The absolute path of the file.

        Raises:
            StateError: the model has no parameters yet, or does not have this average.
            CheckpointError: the file cannot be written.
        """
        variables = as_variables(self.evaluation_state(weights))
        if (merge or rules is not None) and isinstance(self.model, LoraModel):
            variables = self.model.merged(variables)
        if (torch := as_rules(rules)) is None:
            return export_weights(path, variables, only=only)
        init = traced_init(self)
        return export_torch_weights(path, self.model, variables, torch, init, only=only)

    def evaluation_state(self, weights: str | None = None) -> TrainState:
        """Returns the state with the parameters for evaluation; see `optim.evaluation_params`.

        For most optimizers this is the state itself.

        Args:
            weights: `"raw"`, or an average of the weights, `"ema"` or `"swa"`. By default those
                that `monitor` judges: `"ema"` if it is `val_ema/loss`, otherwise `"raw"`.

        Raises:
            StateError: the model has no parameters yet, or does not have this average.
            ConfigError: `weights` is another name.
        """
        return self._workspace.evaluation_state(weights)

    def _pass(self, loader: Any, name: str) -> Iterator[Batch]:
        """Yields the batches of a loader once, in order, and shows the progress."""
        feeds = self._workspace.feeds
        with feeds.one_pass(self._workspace.loader(loader, name), name) as view:
            total, batches = num_batches(view), feeds.batches(view, name)
            yield from self.tracker(batches, description=name, total=total)
