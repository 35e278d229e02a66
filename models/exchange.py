"""Other exchanges of messengers than the paper's shuffle, to compare it with (``MODEL.MSG.MANIP_TYPE``)."""

import torch

from .tracing import plain_sizes


def average_messengers(messengers):
    """Every messenger of a region becomes the mean of them all: m'_j = (m_1 + ... + m_G) / G.

    All of them know of every window, but no longer of their own more than of others.

    Args:
        messengers: (B*regions, G, C). The result has its shape.
    """
    return messengers.mean(1, keepdim=True).expand_as(messengers)


def shift_messengers(messengers):
    """Channel group g moves on by g windows: m'_j[g] = m_(j+g mod G)[g], with G groups of C/G channels.

    As in the shuffle, every messenger gets one group of every window, but each group keeps its channels.

    Args:
        messengers: (B*regions, G, C), with C a multiple of G. The result has its shape.
    """
    (windows,) = plain_sizes(messengers.shape[1])
    groups = messengers.unflatten(2, (windows, -1))  # B*regions, G windows, G groups, C/G
    group = torch.arange(windows, device=messengers.device)
    return groups[:, (group[:, None] + group) % windows, group].flatten(2)  # B*regions, G windows, C


OTHER_EXCHANGES = {"mean": average_messengers, "shift": shift_messengers, "none": None}
