"""Model FLOPs: what the mathematics of a training step needs, whatever the program executes.

    FLOPs a token = 6 x N_matmul + 6 x L x N x H x T

N_matmul counts the parameters that a token is multiplied with (no embedding look-up, no norm scales;
a tied output matrix counts). The second term is attention's two products over the causal half of the
square. Recomputation does not count (PaLM's convention, arXiv:2204.02311 appendix B, with the half);
MaxText's figure for 7B at T = 2048 is the same to the digit.
"""

from llama_jax import config, tree
from llama_jax.model import transformer
from llama_jax.model.transformer import Transformer


def matmul_parameters(module: Transformer) -> int:
    labels = tree.paths(transformer.letters(module))
    sizes = {name: leaf.size for name, leaf in tree.paths(transformer.abstract(module)).items()}
    used = sum(sizes[name] for name, label in labels.items() if len(label.strip("L")) >= 2)
    return used if module.config.output == "tied" else used - sizes["embed"]


def per_token(module: Transformer, seq_len: int) -> int:
    """Forward and backward FLOPs of one token in a row of `seq_len`."""
    model: config.Model = module.config
    attention = 6 * model.layers * model.heads * model.head_dim * seq_len
    return 6 * matmul_parameters(module) + attention
