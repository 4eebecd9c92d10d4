"""The bookkeeping of best weights and the restarts of stage two."""

from pipeline.training.stage_two import Standing, after_evaluation, goes_back


def test_the_published_sequence_is_repeated() -> None:
    """APs after each of nine epochs, the switch after the third; what happened in the released program."""
    aps = [0.10, 0.20, 0.15, 0.18, 0.21, 0.22, 0.20, 0.23]
    switch = 3
    standing, best_one, best, restarts = Standing(), [], [], []
    for epoch, ap in enumerate(aps):
        if goes_back(standing, epoch, switch):
            restarts.append(epoch)
        before = standing
        standing = after_evaluation(standing, ap=ap, step=epoch + 1, stage_one=epoch < switch)
        if standing.stage_one_step != before.stage_one_step:
            best_one.append(epoch)
        if standing.best_step != before.best_step and epoch >= switch:
            best.append(epoch)
    assert best_one == [0, 1]  # stage one's best is saved
    assert restarts == [3, 4, 7]  # at the switch; after .18, which is below .20; after .20, which is below .22
    assert best == [4, 5, 7]
    assert (standing.best_ap, standing.best_step, standing.stage_one_step) == (0.23, 8, 2)


def test_nothing_is_gone_back_to_without_an_evaluation_or_a_second_stage() -> None:
    assert not goes_back(Standing(), 3, 3)
    standing = after_evaluation(Standing(), ap=0.5, step=1, stage_one=True)
    standing = after_evaluation(standing, ap=0.4, step=2, stage_one=True)
    assert not goes_back(standing, 2, None)
    assert not goes_back(standing, 2, 3)
    assert goes_back(standing, 3, 3)


def test_a_restart_happens_once() -> None:
    standing = after_evaluation(Standing(), ap=0.5, step=1, stage_one=True)
    standing = after_evaluation(standing, ap=0.4, step=2, stage_one=False)
    assert goes_back(standing, 2, 1)
    assert not goes_back(standing, 3, 1)
