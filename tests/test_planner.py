"""The planner against the arrays that are really made."""

import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from paged_jax import CacheConfig, KVCache, models
from paged_jax.cache.sizes import free_bytes, read_bytes, write_bytes
from paged_jax.cli import main
from paged_jax.models.checkpoint import decoder_config
from paged_jax.models.decoder import Decoder
from paged_jax.planner import CHIPS, Chip, alternatives, find_chip, find_sizes, make_plan, measure_bandwidth
from pallas_kernels import init_pages

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "dtype": "float32",
}  # fmt: skip
GEMMA = LLAMA | {
    "model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 32, "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
ROOT = pathlib.Path(__file__).parent.parent
MEMORY = Chip("small", 2**20, 1e9, "cpu")
CASES = {  # config.json, options of the plan
    "plain": (LLAMA, {}),
    "hybrid": (GEMMA, {"max_sequences": 3}),
    "int8": (LLAMA, {"cache_dtype": "int8"}),
    "float8": (LLAMA | {"head_dim": 24}, {"cache_dtype": jnp.float8_e4m3fn, "page_size": 8}),
    "experts": (MIXTRAL, {}),
    "tied": (LLAMA | {"tie_word_embeddings": True}, {"dtype": "bfloat16"}),
}


def folder_of(path: pathlib.Path, hf_config: dict) -> pathlib.Path:
    """A checkpoint of random weights."""
    decoder = nnx.state(Decoder(decoder_config(hf_config), rngs=nnx.Rngs(0)))
    models.save(path, hf_config, decoder)
    return path


def num_bytes(tree, device=None) -> int:
    """Of the arrays in a pytree; with a device, of what it holds of them."""
    leaves = jax.tree.leaves(tree)
    if device is None:
        return sum(leaf.nbytes for leaf in leaves)
    shards = (shard for leaf in leaves for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_load_and_create_take(tmp_path, name):
    hf_config, options = CASES[name]
    folder = folder_of(tmp_path, hf_config)
    plan = make_plan(str(folder), MEMORY, context=96, **options)
    model = models.load(folder, options.get("dtype"))
    cache = jax.jit(KVCache.create, static_argnums=0)(plan.config)
    assert plan.weights.total == num_bytes(model.params)
    assert plan.pool_bytes == cache.pool.num_bytes == num_bytes(cache.pool)
    assert plan.table_bytes == num_bytes(cache.tables)
    assert plan.weights.total + plan.pool_bytes <= plan.memory_bytes, "it fits"
    one_more = dataclasses.replace(plan.config, num_pages=plan.config.num_pages + 1)
    assert plan.weights.total + one_more.pool_bytes > plan.memory_bytes, "and no page more does"
    assert plan.num_sequences() >= 1 and (
        plan.config.max_sequences == options.get("max_sequences", plan.num_sequences())
    )


def test_the_plan_of_several_devices_is_what_each_of_them_holds(tmp_path):
    folder = folder_of(tmp_path, LLAMA)
    plan = make_plan(folder, MEMORY, context=96, num_devices=2)
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    model = models.load(folder, sharding=mesh)
    cache = KVCache.create(plan.config, mesh)
    for device in jax.devices()[:2]:
        assert plan.weights.total == num_bytes(model.params, device)
        assert plan.pool_bytes == num_bytes(cache.pool, device)
        assert plan.table_bytes == num_bytes(cache.tables, device)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_pages_on_a_tpu_are_padded_as_there(dtype):
    sizes = "num_layers=3,num_kv_heads=2,head_dim=80,num_params=1000"
    plan = make_plan(sizes, CHIPS["v5e"], context=64, cache_dtype=dtype)
    made = jax.eval_shape(lambda: init_pages(3 * plan.config.num_pages, 2, 16, 80, dtype, is_padded=True))
    assert plan.pool_bytes == made.num_bytes
    assert make_plan(sizes, CHIPS["h200"], context=64, cache_dtype=dtype).layer_page_bytes < plan.layer_page_bytes


def test_sequences_are_counted_by_their_pages():
    sizes = "num_layers=1,num_kv_heads=1,head_dim=64,num_params=0"
    plan = make_plan(sizes, 21 * 4096, context=64, headroom=0.0, max_sequences=8)
    assert plan.config.num_pages == 21 and plan.num_sequences() == 5
    assert plan.num_sequences(16) == 20 and plan.num_sequences([16, 64]) == 8
    shared = dataclasses.replace(plan, shared_tokens=48)
    assert shared.num_sequences() == 17, "three pages once, and one each"
    assert shared.num_sequences([16, 64]) == 34, "half of them have no page of their own"


def test_layers_with_windows_leave_more_rows():
    sizes = "num_layers=6,num_kv_heads=1,head_dim=64,num_params=0"
    plan = make_plan(f"{sizes},window=64,window_layers=5", "16MiB", context=1024)
    full = make_plan(f"{sizes},window=64,window_layers=5", "16MiB", context=1024, windows=False)
    assert plan.num_sequences() >= plan.config.max_sequences > 3 * full.num_sequences()
    assert plan.pool_bytes <= 2**24 * 0.9


def test_bandwidth_bounds_the_tokens(tmp_path):
    plan = make_plan("num_layers=1,num_kv_heads=1,head_dim=64,num_params=1000", MEMORY, context=32)
    assert plan.tokens_per_second(2) == 2 * 1e9 / (2000 + 2 * 32 * 256)
    folder = folder_of(tmp_path, MIXTRAL)
    experts = make_plan(folder, MEMORY, context=32)
    of_experts = 2 * 4 * 3 * 32 * 64 * 4  # layers, experts, matrices
    assert experts.weights.of_experts == of_experts and experts.weights.looked_up == 96 * 32 * 4
    kv = 32 * experts.bytes_per_token
    assert experts.step_bytes(1) == experts.weights.total - 96 * 32 * 4 - of_experts / 2 + kv
    assert measure_bandwidth(2**20) > 0


@pytest.mark.parametrize(
    ("model", "memory", "options", "message"),
    [
        ("layers=3", "1GiB", {}, "'layers' is no size of a model: it has num_layers"),
        ("num_layers=3", "1GiB", {}, "does not say num_kv_heads"),
        ("num_layers=x", "1GiB", {}, "num_layers='x' is no number"),
        ("num_layers=2,num_kv_heads=1,head_dim=8,num_params=1,window=4", "1GiB", {}, "give both, or neither"),
        ("num_layers=2,num_kv_heads=1,head_dim=8,num_params=1", "v9", {}, "or name one of v5e, v5p"),
        ("num_layers=2,num_kv_heads=1,head_dim=8,num_params=1", "1GiB", {"num_devices": 2}, "does not divide the 1 KV"),
        ("num_layers=2,num_kv_heads=1,head_dim=8,num_params=1", "1GiB", {"headroom": 1.0}, "must lie in"),
        (
            "num_layers=2,num_kv_heads=1,head_dim=8,num_params=1e9",
            "1GiB",
            {},
            "take 1.9 GiB, and the device has 921.6 MiB",
        ),
        (
            "num_layers=99,num_kv_heads=99,head_dim=99,num_params=4e8",
            "1GiB",
            {},
            "no sequence of 64 tokens fits beside",
        ),
        ("num_layers=2,num_kv_heads=1,head_dim=8,num_params=1", "1GiB", {"shared_tokens": 64}, "must lie in [0, 64)"),
        ("num_layers=2,num_kv_heads=1,head_dim=8,num_params=1", "1GiB", {"dtype": "int8"}, "use float32 or bfloat16"),
        ("num_layers=2,num_kv_heads=1,head_dim=8,num_params=1", "1GiB", {"num_devices": 0}, "num_devices=0 must be a"),
        ("num_layers=2,num_kv_heads=1,head_dim=8,num_params=1", "1GiB", {"page_size": 0}, "page_size=0 must be a"),
        ("/nowhere", "1GiB", {}, "/nowhere/config.json"),
    ],
)
def test_what_is_not_understood_is_named(model, memory, options, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        make_plan(model, memory, context=64, **options)


def test_an_mlp_that_does_not_split_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": 65}))
    with pytest.raises(ValueError, match="num_devices=2 does not divide the 65 numbers in an MLP of"):
        make_plan(tmp_path, "1GiB", context=64, num_devices=2)


def test_sizes_are_read_as_people_write_them():
    assert read_bytes("16GiB") == 16 * 2**30 and read_bytes("1.5 GB") == 1_500_000_000 and read_bytes(4e9) == 4 * 10**9
    assert read_bytes("7") == 7 and write_bytes(3 * 2**20) == "3.0 MiB" and write_bytes(12) == "12 bytes"
    for size in ("16 apples", "GiB", "1e400 GiB", 1.5, True, math.inf, math.nan):
        with pytest.raises(ValueError, match="whole number of bytes|write a number of bytes"):
            read_bytes(size)
    assert 2**20 < free_bytes() <= find_chip("here").memory_bytes * 2


def test_configs_take_dtypes_and_budgets_as_people_have_them():
    model = models.load(models.DEMO)
    rows = {"max_sequences": 2, "max_pages_per_sequence": 4}
    config = model.cache_config(pool_bytes=4e6, **rows)
    assert config.dtype == model.dtype and 3.9e6 < config.pool_bytes <= 4e6
    assert model.cache_config(num_pages=5, dtype=jnp.bfloat16, **rows).dtype == "bfloat16"
    assert model.cache_config(pool_bytes="4MB", **rows) == config
    with pytest.raises(ValueError, match="num_pages=5 and pool_bytes=4MB both size the pool: give one"):
        model.cache_config(num_pages=5, pool_bytes="4MB", **rows)
    share = CacheConfig.for_memory(share=0.01, **model.cache_sizes, **rows)
    assert 0.005 * free_bytes() < share.pool_bytes < 0.02 * free_bytes()
    with pytest.raises(ValueError, match=r"share=1.5 of the free memory: it must lie between 0 and 1"):
        CacheConfig.for_memory(share=1.5, **model.cache_sizes, **rows)
    assert find_sizes(model) == find_sizes(models.DEMO)
    assert models.load(models.DEMO, jnp.float32).dtype == "float32"


def test_the_command_prints_a_plan_and_what_would_change_it(capsys, monkeypatch):
    monkeypatch.setattr("paged_jax.cli.keep_compiled_programs", lambda: None)
    sizes = "num_layers=36,num_kv_heads=8,head_dim=128,num_params=8e9"
    assert main(["plan", "--model", sizes, "--memory", "v6e", "--context", "4096"]) == 0
    printed = capsys.readouterr().out
    plan = make_plan(sizes, "v6e", context=4096)
    assert f"{plan.num_sequences()} at the same time" in printed and "1,640 GB/s" in printed
    assert "cache_dtype=int8" in printed and "num_devices=8" in printed
    names = [name for name, _ in alternatives(sizes, "v6e", context=4096)]
    assert all(name in printed for name in names)
    assert main(["plan", "--memory", "3 apples"]) == 2 and "'3 apples' is no size" in capsys.readouterr().err


MEASURE = """
import json, sys
import jax
from paged_jax import KVCache, models
from paged_jax.planner import make_plan

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

plan = make_plan(models.DEMO, 2**28, context=512)
jax.block_until_ready(KVCache.create(plan.config))  # given up again: what is compiled at first use stays
before = resident()
cache = jax.block_until_ready(KVCache.create(plan.config))
print(json.dumps([plan.pool_bytes + plan.table_bytes, resident() - before]))
"""


def test_the_command_prints_what_would_fit_where_the_plan_does_not(capsys, monkeypatch):
    monkeypatch.setattr("paged_jax.cli.keep_compiled_programs", lambda: None)
    sizes = "num_layers=32,num_kv_heads=8,head_dim=128,num_params=8e9"
    assert main(["plan", "--model", sizes, "--memory", "v5e", "--context", "8192"]) == 1
    printed = capsys.readouterr().out
    assert "It does not fit: the weights of a model take 14.9 GiB, and the device has 14.4 GiB for them" in printed
    lines = [line.split("│") for line in printed.split("\n") if "│" in line]
    rows = {cells[1].strip(): cells[2].strip() for cells in lines}
    assert rows["page_size=16"] == "none" and rows["num_devices=2"] == "13"
    assert main(["plan", "--model", sizes, "--memory", "1GiB", "--context", "8192"]) == 2
    assert "use more devices, or one with more memory" in capsys.readouterr().err


def test_the_pool_takes_so_much_of_this_process():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=ROOT, check=True)
    planned, taken = json.loads(result.stdout)
    assert abs(taken - planned) < 0.01 * planned
