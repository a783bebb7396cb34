"""Distances between images."""

import torch

from edmdistill.methods.distances import DISTANCES, l2, perception_roles, pseudo_huber

A, B = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_they_are_distances_of_each_sample() -> None:
    for distance in DISTANCES.values():
        values = distance(A, B)
        assert values.shape == (4,)
        assert bool((values > 0).all())
        torch.testing.assert_close(values, distance(B, A))
        assert torch.equal(distance(A, A), torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(distance(A[1:2], B[1:2]), values[1:2])


def test_they_do_not_depend_on_the_resolution() -> None:
    for distance in DISTANCES.values():
        large = distance(A.repeat(1, 1, 2, 2), B.repeat(1, 1, 2, 2))
        torch.testing.assert_close(large, distance(A, B))


def test_pseudo_huber_is_the_root_mean_square_far_from_0_and_l2_near_it() -> None:
    torch.testing.assert_close(pseudo_huber(A, B), l2(A, B).sqrt(), rtol=1e-3, atol=0)
    near, c = A + 1e-7, 0.00054
    torch.testing.assert_close(pseudo_huber(near, A), l2(near, A) / (2 * c), rtol=1e-3, atol=0)


def test_only_a_perceptual_distance_has_a_role() -> None:
    assert perception_roles("") == {}
    assert not perception_roles("lpips.pt")["perception"].trained
