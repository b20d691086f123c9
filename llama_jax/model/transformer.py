"""The decoder-only transformer: embedding, a scan over groups of layers, norm, output matrix.

The scan makes compile time and program size independent of depth. A group is one turn of
`config.pattern`; its parameters carry a leading "L".
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax import config, tree
from llama_jax.model import cache, kernels
from llama_jax.model.block import BLOCKS, PLACEMENTS
from llama_jax.model.context import Cached, Context, Keys, Memories, Memory, NoMemory, OneSegment
from llama_jax.model.ffn import FFNS
from llama_jax.model.init import INITS, initial, mup_ratio, param
from llama_jax.model.norm import NORMS
from llama_jax.model.position import POSITIONS
from llama_jax.model.quantised import Quantised, product, spread
from llama_jax.model.table import look_up
from llama_jax.sharding import Layout


# What the backward pass finds stored; the rest is computed again (arXiv:1604.06174).
def _save(*names: str):
    """These, and "rms": a number a row that spares a pass over x."""
    return jax.checkpoint_policies.save_only_these_names("rms", *names)


def _all_but_gathered(primitive, *_, **params) -> bool:
    """Gathered weights are gathered again: kept, they would undo FSDP.

    They are results of a constraint, with a name after it; of other constraints what goes in is kept.
    """
    return primitive.name != "sharding_constraint" and params.get("name") != "gathered"


REMAT = {
    "none": _all_but_gathered,
    "full": _save(),
    "dots": _save("linear"),
    # "we save the outputs of linear layers" (arXiv:2302.13971 section 2.4), queries and keys as attention
    # reads them, and what it made of them.
    "linear": _save("q", "k", "v", "attended", "attention_out", "gate", "up", "ffn_out"),
    "attention": _save("q", "k", "v", "attended"),
    # As linear, but kept in the host's memory.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["rms"],
        names_which_can_be_offloaded=["q", "k", "v", "attended", "gate", "up"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Hidden(NamedTuple):
    """Final states and the matrix that turns them into logits: `logits(hidden)`.

    Kept apart so that a loss can take the vocabulary a piece at a time.
    """

    x_BTD: jax.Array
    w_DV: jax.Array | Quantised


def logits(hidden: Hidden) -> jax.Array:
    """float32 [B, T, V]."""
    if isinstance(hidden.w_DV, Quantised):
        return product("BTD,DV->BTV", hidden.x_BTD, hidden.w_DV, jnp.float32)
    return jnp.einsum("BTD,DV->BTV", hidden.x_BTD, hidden.w_DV, preferred_element_type=jnp.float32)


def output_matrix(model: config.Model, params: Any) -> jax.Array | Quantised:
    """The matrix of `Hidden`, [D, V], of parameters in the compute dtype, as `unstack` gives them."""
    if model.output == "tied":
        return jax.tree.map(lambda x: jnp.einsum("VD->DV", x), params["embed"])
    return params["output"]


class Group(nn.Module):
    """The layers of one turn of the pattern, in the form of a scan's body."""

    config: config.Model
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, None]:
        for i, kind in enumerate(self.config.pattern):
            block = BLOCKS[kind].module(self.config, self.layout, name=f"{kind}_{i}")
            x_BTD = block(x_BTD, context)
        return x_BTD, None


class Transformer(nn.Module):
    """tokens_BT and positions_BT, which keys self-attention sees, and what cross-attention reads -> Hidden.

    With `Cached` keys the collection "cache" is an argument and, as it is then, a result (cache.py).
    """

    config: config.Model
    layout: Layout
    stacked: bool = True  # parameters of layers, along L; else as `unstack` gives them

    if TYPE_CHECKING:  # Linen's annotations leave out that a module can be hashed

        def __hash__(self) -> int: ...

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        keys: Keys = OneSegment(),
        memory: Memories = NoMemory(),
    ) -> Hidden:
        config, act = self.config, self.layout.act
        norm = functools.partial(NORMS[config.norm], config, self.layout)
        placement = PLACEMENTS[config.placement]
        w_VD = param(self, "embed", "VD", initial(config, "table"))
        embedded_BTD = look_up(w_VD, tokens_BT, self.layout, "VD", config.compute_dtype)
        x_BTD = act(embedded_BTD, "BTD")
        reach = tokens_BT.shape[1]
        if isinstance(keys, Cached):
            reach = cache.slots(self, self.variables[cache.CACHE])
        where = POSITIONS[config.position](self, positions_BT, reach)
        if where.added_BTD is not None:
            x_BTD = act(x_BTD + where.added_BTD, "BTD")
        if placement.norm_embedding:
            x_BTD = norm(name="embed_norm")(x_BTD)
        context = Context(positions_BT, where, keys, memory)
        if self.stacked:
            x_BTD = self.scanned(x_BTD, context)
        else:
            for i in range(config.groups):
                group = Group(config, self.layout, name=f"group_{i}")
                x_BTD, _ = group(x_BTD, context)
        if placement.norm_output:
            x_BTD = norm(name="norm")(x_BTD)
        if config.init == "mup":
            x_BTD = x_BTD / mup_ratio(config)
        if config.output == "tied":
            return Hidden(x_BTD, output_matrix(config, {"embed": w_VD}))
        w_DV = param(self, "output", "DV", initial(config, "output"))
        return Hidden(x_BTD, output_matrix(config, {"output": w_DV}))

    def scanned(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        config = self.config
        body = Group
        if config.remat != "none" or self.layout.mesh.size > 1:
            body = nn.remat(Group, policy=REMAT[config.remat], prevent_cse=False)
        groups = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  (Linen's annotation lacks it)
            length=config.groups,
            unroll=config.unrolled,
            metadata_params={nn.PARTITION_NAME: "L"},
        )
        x_BTD, _ = groups(config, self.layout, name="groups")(x_BTD, context)
        return x_BTD

    @property
    def caches(self) -> dict[str, dict[str, dict[str, str]]]:
        """The letters of what the blocks of a group cache, by block, submodule and name."""
        kinds = enumerate(self.config.pattern)
        return {f"{kind}_{i}": BLOCKS[kind].caches for i, kind in kinds if BLOCKS[kind].caches}


def build(model: config.Model, layout: Layout) -> Transformer:
    """The module, after checking that its slots exist and that its parameters divide by the mesh."""
    for slots, field in (
        *((NORMS, "norm"), (PLACEMENTS, "placement"), (POSITIONS, "position"), (FFNS, "ffn")),
        *((INITS, "init"), (kernels.KERNELS, "kernel"), (REMAT, "remat")),
        (("none", *NORMS), "qk_norm"),
    ):
        config.choose(slots, getattr(model, field), f"model.{field}")
    if what := kernels.unable(model, model.kernel):
        raise ValueError(
            f"model.kernel={model.kernel!r} cannot do {what}; set model.kernel to 'blockwise'"
        )
    for kind in model.pattern:
        config.choose(BLOCKS, kind, "model.pattern")
    module = Transformer(model, layout)
    shapes, labels = tree.paths(abstract(module)), tree.paths(letters(module))
    for name, shape in shapes.items():
        layout.check(shape.shape, labels[name], name)
    return module


def portable(module: Transformer) -> Transformer:
    """The same network with the attention kernel that every device and every length has.

    Training chooses a kernel for its own devices and rows. Scoring and calibration read rows of other
    lengths, often elsewhere: splash needs a TPU and multiples of 128, cuDNN a GPU and 16-bit types.
    """
    return module.clone(config=dataclasses.replace(module.config, kernel="blockwise"))


def init(module: Transformer, key: jax.Array) -> Any:
    """Parameters, a nested dict of float32 arrays. Call it under jit with out_shardings."""
    return nn.unbox(_boxed(module, key))


def abstract(module: Transformer) -> Any:
    """The shapes of the parameters; no memory."""
    return nn.unbox(_described(module))


def unstacked(module: Transformer) -> Transformer:
    """The same network for parameters that `unstack` made: each layer reads its own without a copy."""
    return module.clone(stacked=False, layout=module.layout.decoding)


def unstack(module: Transformer, params: Any) -> Any:
    """Parameters for `unstacked(module)`: those of `module` a layer group at a time, in the compute dtype.

    New arrays, 2 bytes a parameter in bfloat16; `params` stay as they are. One program, which other
    parameters of the same shapes do not compile again. Quantised matrices stay integers with their scales.
    """
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(params))
    return _unstacking(module.clone(stacked=True), jax.tree.structure(params), shapes)(params)


def unstack_and_delete(module: Transformer, params: Any) -> Any:
    """`unstack` for parameters that nobody else needs: each stacked array is deleted once it is copied.

    So the most memory is that of `params` and one array more, not both trees.
    """
    groups: list[list[jax.Array]] = [[] for _ in range(module.config.groups)]
    leaves, structure = jax.tree.flatten(params["groups"])
    for leaf in leaves:
        for i, group in enumerate(groups):
            group.append(_in_compute_dtype(module, leaf[i]))
        leaf.delete()
    return _of_groups(module, params, [jax.tree.unflatten(structure, group) for group in groups])


@functools.lru_cache(maxsize=4)
def _unstacking(module: Transformer, structure, shapes: tuple[tuple[int, ...], ...]):
    """The program of `unstack` for a network and parameters of this structure."""

    def unstacked(params):
        def of_group(i):
            return jax.tree.map(lambda w: _in_compute_dtype(module, w[i]), params["groups"])

        return _of_groups(module, params, [of_group(i) for i in range(module.config.groups)])

    def places(letters, w):  # w: one array, or those of a quantised matrix
        return jax.tree.map(lambda part: module.layout.param(spread(letters, part.shape)), w)

    labels = letters(module)
    group = jax.tree.map(lambda of: of.removeprefix("L"), labels.pop("groups"))
    labels |= {f"group_{i}": group for i in range(module.config.groups)}
    params = structure.unflatten([jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes])
    made = jax.eval_shape(unstacked, params)
    return jax.jit(unstacked, out_shardings=jax.tree.map(places, labels, made))


def _of_groups(module: Transformer, params, groups: list[Any]):
    made = {name: w for name, w in params.items() if name != "groups"}
    made = jax.tree.map(functools.partial(_in_compute_dtype, module), made)
    return made | {f"group_{i}": group for i, group in enumerate(groups)}


def _in_compute_dtype(module: Transformer, leaf):
    """Integers and their bfloat16 scales stay as they are."""
    return leaf.astype(module.config.compute_dtype) if leaf.dtype == jnp.float32 else leaf


def letters(module: Transformer) -> Any:
    """The letters of each parameter, a tree of strings like "LDNH"."""
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda box: "".join(box.names), _described(module), is_leaf=is_box)


@functools.lru_cache(
    maxsize=4
)  # a tenth of a second to trace, and asked for a dozen times at a start
def _described(module):
    return jax.eval_shape(lambda: _boxed(module, jax.random.key(0)))


def _boxed(module, key):
    layout = module.layout
    B, T, dtype = layout.row_parts, layout.position_parts, module.config.compute_dtype
    tokens_BT = jnp.zeros((B, T), jnp.int32)  # the fewest
    # Blocks of cross-attention have parameters where there is a memory.
    memory = Memory(jnp.zeros((B, 1, module.config.dim), dtype), jnp.ones((B, T, 1), bool))
    any_length = dataclasses.replace(module.config, kernel="reference")
    whole = module.clone(config=any_length)
    return whole.init(key, tokens_BT, tokens_BT, OneSegment(), memory)["params"]
