"""The bookkeeping of best weights and the restarts of stage two."""

from pipeline.training.stage_two import EvaluationHistory, restarts, with_evaluation


def test_the_published_sequence_is_repeated() -> None:
    """APs after each of nine epochs, the switch after the third; what happened in the released program."""
    aps = [0.10, 0.20, 0.15, 0.18, 0.21, 0.22, 0.20, 0.23]
    switch = 3
    history, best_one, best, restarted = EvaluationHistory(), [], [], []
    for epoch, ap in enumerate(aps):
        if restarts(history, epoch, switch):
            restarted.append(epoch)
        before = history
        history = with_evaluation(history, ap=ap, step=epoch + 1, stage_one=epoch < switch)
        if history.stage_one_step != before.stage_one_step:
            best_one.append(epoch)
        if history.best_step != before.best_step and epoch >= switch:
            best.append(epoch)
    assert best_one == [0, 1]  # stage one's best is saved
    assert restarted == [3, 4, 7]  # at the switch; after .18, which is below .20; after .20, which is below .22
    assert best == [4, 5, 7]
    assert (history.best_ap, history.best_step, history.stage_one_step) == (0.23, 8, 2)


def test_nothing_is_gone_back_to_without_an_evaluation_or_a_second_stage() -> None:
    assert not restarts(EvaluationHistory(), 3, 3)
    history = with_evaluation(EvaluationHistory(), ap=0.5, step=1, stage_one=True)
    history = with_evaluation(history, ap=0.4, step=2, stage_one=True)
    assert not restarts(history, 2, None)
    assert not restarts(history, 2, 3)
    assert restarts(history, 3, 3)


def test_a_restart_happens_once() -> None:
    history = with_evaluation(EvaluationHistory(), ap=0.5, step=1, stage_one=True)
    history = with_evaluation(history, ap=0.4, step=2, stage_one=False)
    assert restarts(history, 2, 1)
    assert not restarts(history, 3, 1)
