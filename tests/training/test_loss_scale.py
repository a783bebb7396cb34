from edmdistill.training.loss_scale import LossScale


def test_loss_scale():
    scale = LossScale(scale=4.0, patience=3)
    for finite, expected in ((True, 4), (True, 4), (True, 8), (True, 8), (False, 4), (True, 4), (True, 4), (True, 8)):
        scale.update(finite)
        assert scale.scale == expected
    again = LossScale()
    again.restore(scale.state())
    assert again.state() == scale.state()
    for _ in range(3):
        assert scale.can_shrink
        scale.update(False)
    assert not scale.can_shrink
