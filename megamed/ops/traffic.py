"""Bytes that one rank sends in one attention layer, by formula; the tests count the real ones.

Shapes: T tokens of a rank, N query heads, G key/value heads, D head width, R ring ranks, U Ulysses ranks.
"""

from dataclasses import dataclass

from megamed.ops.ulysses import kv_copies


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends.

    Attributes:
        forward, backward: in the two passes.
    """

    forward: int
    backward: int


def ring_traffic(num_tokens: int, num_kv_heads: int, head_dim: int, element_size: int, ring: int) -> Traffic:
    """Keys and values make R - 1 hops in each pass, their gradients R - 1 in fp32.

    Args:
        num_tokens: T.
        num_kv_heads, head_dim: G and D.
        element_size: bytes of a key's element.
        ring: R.
    """
    hop = 2 * num_tokens * num_kv_heads * head_dim
    return Traffic((ring - 1) * hop * element_size, (ring - 1) * hop * (element_size + max(element_size, 4)))


def ulysses_traffic(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, element_size: int, ulysses: int
) -> Traffic:
    """Of q, k, v and the output, a rank keeps a U-th; k and v are sent as often as `kv_copies` says.

    Args:
        num_tokens: T.
        num_heads, num_kv_heads, head_dim: N, G and D.
        element_size: bytes of an element.
        ulysses: U.

    Raises:
        UserError: the heads do not divide over the Ulysses ranks.
    """
    heads = 2 * num_heads + 2 * num_kv_heads * kv_copies(num_heads, num_kv_heads, ulysses)
    sent = num_tokens * heads * head_dim * element_size * (ulysses - 1) // ulysses
    return Traffic(sent, sent)


def context_traffic(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, element_size: int, ring: int, ulysses: int
) -> Traffic:
    """Both: the ring goes over U * T tokens of a U-th of the heads. Arguments and errors as above."""
    inside = ulysses_traffic(num_tokens, num_heads, num_kv_heads, head_dim, element_size, ulysses)
    kv_heads = num_kv_heads * kv_copies(num_heads, num_kv_heads, ulysses) // ulysses
    outside = ring_traffic(num_tokens * ulysses, kv_heads, head_dim, element_size, ring)
    return Traffic(inside.forward + outside.forward, inside.backward + outside.backward)
