from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distaff.errors import CheckpointError, ConfigError
from distaff.optim.learned import (
    RELEASED,
    VeloSettings,
    VeloWeights,
    init_weights,
    read_weights,
    weight_shapes,
)
from distaff.optim.learned.gin import read_settings
from distaff.optim.learned.msgpack import read_tree

GOLDEN = Path(__file__).parents[1] / "golden" / "velo" / "small"
SMALL = VeloSettings(lstm_hidden_size=8, param_inits=4)
DATA = (GOLDEN / "params").read_bytes()


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "velo"))


def checkpoint():
    """What a published file holds, as Flax reads it."""
    return flax.serialization.msgpack_restore(DATA)


def written(**changes):
    """A file as Flax writes it, with some of its root changed."""
    return flax.serialization.msgpack_serialize({**checkpoint(), **changes})


def test_arrays_are_those_that_flax_reads(folder):
    weights = read_weights(folder)
    assert weights.settings == SMALL
    expected = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(checkpoint()["params"])
    }
    assert weights.arrays.keys() == expected.keys()
    for path, array in weights.arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[path])


def test_a_network_of_the_released_size_is_read_as_flax_writes_it(tmp_path):
    weights = init_weights(RELEASED)
    tree: dict = {}
    for (*outer, last), array in weights.arrays.items():
        place = tree
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = array
    steps = {"gen_id": "0123456789abcdef" * 3, "step": np.int32(70_000)}
    data = flax.serialization.msgpack_serialize({"params": tree, **steps})
    (tmp_path / "params").write_bytes(data)
    (tmp_path / "config.gin").write_text(
        "import learned_optimization.research.general_lopt.hyper_v2\n\n"
        "# Parameters for HyperV2:\n# ====================\n"
        "HyperV2.lstm_hidden_size = 512\nHyperV2.param_inits = 256\n"
        "HyperV2.use_bugged_loss_features = False\n\n"
        "run_train.lopt = @HyperV2()\nrun_train.outer_learner_fn = \\\n    @GradientLearner\n"
    )
    found = read_weights(str(tmp_path))
    assert found.settings == RELEASED
    for path, array in weights.arrays.items():
        np.testing.assert_array_equal(found.arrays[path], array)


def test_initial_weights_are_those_of_a_fresh_network():
    weights = init_weights(SMALL, seed=3)
    assert {path: array.shape for path, array in weights.arrays.items()} == weight_shapes(SMALL)
    matrix = init_weights(RELEASED).arrays["rnn_params", "rnn/linear", "w"]
    deviation = 0.8796  # of a standard normal that is cut off at 2
    assert matrix.std() == pytest.approx(deviation / np.sqrt(1024), rel=0.01)
    assert np.abs(matrix).max() <= 2 / np.sqrt(1024)
    assert not weights.arrays["rnn_params", "step_size", "b"].any()
    assert not weights.arrays["lstm_init_state", "cell"].any()
    other = init_weights(SMALL, seed=4)
    assert (
        weights.arrays["rnn_params", "linear", "w"] != other.arrays["rnn_params", "linear", "w"]
    ).all()


@pytest.mark.parametrize("missing", ["folder", "params", "config.gin"])
def test_what_is_missing_is_named_with_what_to_fetch_and_where_to_put_it(folder, missing):
    place = folder if missing == "folder" else folder / missing
    shutil.rmtree(folder) if missing == "folder" else place.unlink()
    with pytest.raises(CheckpointError) as error:
        read_weights(folder)
    message = str(error.value)
    assert str(place) in message
    for part in (
        "No such file",
        "gs://gresearch/learned_optimization/pretrained_lopts/aug12_continue_on_bigger_2xbs_",
        "https://storage.googleapis.com/",
        "`params`",
        "`config.gin`",
        'OptimizerConfig("velo", options={"weights": "/that/folder"})',
    ):
        assert part in message


def test_the_home_directory_is_known(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert read_weights("~/velo").settings == SMALL


@pytest.mark.parametrize("name", ["params", "config.gin"])
@pytest.mark.parametrize("kind", ["link", "directory", "fifo", "large"])
def test_only_a_plain_file_of_sensible_size_is_opened(folder, name, kind):
    path = folder / name
    path.rename(folder / "original")
    match kind:
        case "link":
            path.symlink_to(folder / "original")
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)  # Opening it would wait for ever.
        case "large":
            path.touch()
            os.truncate(path, 2**28)
    with pytest.raises(
        CheckpointError, match=rf"{name} must be a regular file, not a link, of at most"
    ):
        read_weights(folder)


def test_a_path_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="null"):
        read_weights("a\0b")


def changed(path, leaf):
    """The file with one leaf replaced, or removed if it is None."""
    tree = checkpoint()["params"]
    place = tree
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = leaf
    if leaf is None:
        del place[path[-1]]
    return written(params=tree)


B0 = ("ff_mod_stack", "~", "b0")
ZEROS = np.zeros([4, 4], np.float32)
WITH_NAN = np.full([4, 4], np.nan, np.float32)
WITH_INF = np.full([4, 4], np.inf, np.float32)


def nested(levels):
    return b"\x81\xa1a" * levels + b"\xc0"


def array_of(shape, dtype, buffer):
    """An array as the format has it, whatever it claims."""
    name = dtype.encode()
    head = b"\x93" + bytes([0x90 | len(shape)])
    lengths = b"".join(b"\xcf" + struct.pack(">Q", length) for length in shape)
    body = head + lengths + bytes([0xA0 | len(name)]) + name
    body += b"\xc6" + struct.pack(">I", len(buffer)) + buffer
    return b"\xc9" + struct.pack(">Ib", len(body), 1) + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends at byte 0"),
        (DATA[:-1], "in the middle of a value"),
        (DATA + b"\0", "1 bytes follow"),
        (written(extra=1), "`params`, `gen_id` and `step` only"),
        (flax.serialization.msgpack_serialize({"params": {}}), "`step` only"),
        (flax.serialization.msgpack_serialize(ZEROS), "`step` only"),
        (changed(B0, None), r"float32\[4, 4\] at 'ff_mod_stack/~/b0'; got missing"),
        (changed(B0, np.zeros([4, 5], np.float32)), r"got float32\[4, 5\]"),
        (changed(B0, ZEROS.astype(np.int32)), r"got int32\[4, 4\]"),
        (changed(B0, 3), r"got int"),
        (changed(B0, "x"), r"got str"),
        (changed(B0, ZEROS.astype(np.float64)), "do not match its shape and dtype"),
        (changed(B0, ZEROS.astype(np.complex64)), "do not match its shape and dtype"),
        (changed(B0, WITH_NAN), "weights at 'ff_mod_stack/~/b0' are not finite"),
        (changed(B0, WITH_INF), "are not finite"),
        (changed(("ff_mod_stack", "~", "b3"), ZEROS), r"has nothing at 'ff_mod_stack/~/b3'"),
        (changed(("extra",), {"a": ZEROS}), r"has nothing at 'extra/a'"),
        (changed(B0, 1 + 2j), "an extension that is not an array"),
        (changed(B0, 0.5), "a value that is a float"),
        (changed(B0, [1, 2]), r"2 exceeds max_array_len\(0\)"),
        (changed(B0, True), "a value that is a bool"),
        (b"\xdf\xff\xff\xff\xff", r"exceeds max_map_len\(32\)"),
        (b"\xdd\xff\xff\xff\xff", r"exceeds max_array_len\(0\)"),
        (b"\xdb\xff\xff\xff\xff", "in the middle of a value"),
        (b"\x82\xa1a\xc0\xa1a\xc0", "a duplicate key"),
        (b"\x81\x01\xc0", "int is not allowed for map key"),
        (b"\x81\xa1\xff\xc0", "'utf-8' codec"),
        (nested(5), "more than 4 levels"),
        (nested(100_000), "more than 4 levels"),
        (array_of([2], "float32", b"\0" * 4), "do not match its shape"),
        (array_of([0, 2**63], "float32", b""), "integers >= 1"),
        (array_of([2**63, 2**63], "float32", b"\0" * 8), "do not match its shape"),
        (array_of([1] * 9, "float32", b"\0" * 4), r"9 exceeds max_array_len\(8\)"),
        (array_of([1], "object", b"\0" * 8), "do not match its shape and dtype"),
        (array_of([1], "f4,f4", b"\0" * 8), "do not match its shape and dtype"),
        (array_of([1], "bfloat16", b"\0" * 2), "do not match its shape and dtype"),
        (
            array_of([1], "float32", b"\0" * 4)[:-5] + b"\0" * 5,
            "has an extension that is not an array: .*extra data",
        ),
        (b"\xc7\x01\x01\x00", "an extension that is not an array"),
        (b"\xc7\x12\x01\x93\x91\x01\xa7float32\xc4\x04\0\0\0\0", "in the middle of a value"),
        (b"\xc7\x12\x01\x93\x91\x01\xa7float32\xc4\x04\0\0\0\0\0", "not an array: .*extra data"),
        (b"\xd6\xff\0\0\0\0", "an extension that is not an array|a Timestamp"),
        (b"\x80\x04\x95", "follow"),  # the beginning of a pickle
    ],
)
def test_a_hostile_file_is_refused(folder, data, message):
    (folder / "params").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(folder)
    assert str(error.value).startswith(f"The weights in {folder} cannot be used: ")


def test_a_file_that_was_cut_anywhere_is_refused():
    for length in range(0, len(DATA), 13):
        with pytest.raises(CheckpointError, match="in the middle of a value"):
            read_tree(DATA[:length])


def is_read_or_refused(data: bytes) -> bool:
    """Tells whether what is read holds no more than the data; nothing else may be raised."""
    try:
        tree = read_tree(data)
    except CheckpointError:
        return True
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree)) <= 8 * len(data)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(DATA) - 1), st.integers(0, 255))
def test_a_file_with_any_byte_changed_is_read_or_refused(position, byte):
    assert is_read_or_refused(DATA[:position] + bytes([byte]) + DATA[position + 1 :])


@settings(deadline=None, max_examples=500)
@example(b"\xc7\x00\x01")
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data):
    assert is_read_or_refused(data)


def test_what_is_read_is_what_flax_reads():
    tree = {
        "array": np.arange(6, dtype=np.int64).reshape(2, 3),
        "scalar": np.float32(0.5),
        "numbers": {"a": 0, "b": -1, "c": 255, "d": -129, "e": 2**40, "f": -(2**40), "g": 40_000},
        "text": "x" * 300,
        "nothing": None,
    }
    found = read_tree(flax.serialization.msgpack_serialize(tree))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, tree))
    assert found.keys() == tree.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", VeloSettings()),
        ("HyperV2.param_inits = 4", VeloSettings(param_inits=4)),
        ("a.b.hyper_v2.HyperV2.param_inits=4  # few", VeloSettings(param_inits=4)),
        ("HyperV2.param_inits = \\\n    4\n", VeloSettings(param_inits=4)),
        (
            "HyperV2.use_bugged_next_lstm_state = True",
            VeloSettings(use_bugged_next_lstm_state=True),
        ),
        ("# HyperV2.param_inits = 4\nscope/HyperV2.param_inits = 5", VeloSettings()),
        (
            "HyperV2.initial_momentum_decays = \\\n    (0.9,\n     0.99,\n     0.999)",
            VeloSettings(),
        ),
        ("HyperV2.reparam_decay = 1.0\nHyperV2.exp_mult = 0.001", VeloSettings()),
        ("Adam.learning_rate = %RATE\nRATE = @f()\nrun_train.lopt = @x/HyperV2()", VeloSettings()),
        ("from a import b\ninclude 'c.gin'\nimport d\nf.x = [\n1,\n]", VeloSettings()),
    ],
)
def test_config_binds_settings(text, expected):
    assert read_settings(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nHyperV2:", r"Line 2 of config.gin must be `name.argument = value`; got 'HyperV2:'"),
        (
            "HyperV2.lstm_hiden_size = 8",
            r"binds 'lstm_hiden_size'\. Did you mean 'lstm_hidden_size",
        ),
        ("HyperV2.precondition_output = True", r"leave precondition_output at False, .* 'True'"),
        ("HyperV2.with_g = 1", r"must leave with_g at True"),
        ("HyperV2.initial_rms_decays = (0.9,)", r"leave initial_rms_decays at \(0\.999,\)"),
        ("HyperV2.param_inits = %N", r"must bind param_inits to a number, .* '%N'"),
        ("HyperV2.param_inits = __import__('os').getpid()", r"and binds it to .__import__"),
        ("HyperV2.param_inits = " + "(" * 100_000, r"must bind param_inits to a number"),
        ("HyperV2.param_inits = 4\nHyperV2.param_inits = 5", r"Line 2 .* a second time"),
        ("HyperV2.param_inits = 4.0", r"param_inits .* an int from 1 to 65536; got 4\.0"),
        ("HyperV2.param_inits = 10**9", r"must bind param_inits to a number"),
        ("HyperV2.param_inits = 1000000000", r"from 1 to 65536"),
        ("HyperV2.use_bugged_loss_features = 0", r"True or False; got 0"),
        ("run_train.lopt = @MLPLOpt()", r"must train @HyperV2\(\), and trains '@MLPLOpt\(\)'"),
    ],
    ids=lambda value: value[:30],
)
def test_config_refuses(text, message):
    with pytest.raises(CheckpointError, match=message):
        read_settings(text)


def test_a_config_that_is_no_text_or_of_another_size_is_refused(folder):
    (folder / "config.gin").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"cannot be used: .*utf-8.*Fetch both files again"):
        read_weights(folder)
    (folder / "config.gin").write_text("")
    with pytest.raises(CheckpointError, match=r"lstm_hidden_size=128.*got float32\[4"):
        read_weights(folder)


def test_weights_made_by_hand_are_checked_too():
    arrays = dict(init_weights(SMALL).arrays)
    del arrays["rnn_params", "step_size", "w"]
    with pytest.raises(CheckpointError, match=r"'rnn_params/step_size/w'; got missing"):
        VeloWeights(SMALL, arrays)
    with pytest.raises(ConfigError, match=r"param_inits .*; got 0"):
        VeloSettings(param_inits=0)
