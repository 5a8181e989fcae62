from model.baselines.bert_tagger import runs


def test_neighbours_make_a_run():
    assert runs([False, True, True, False, True]) == [(1, 3), (4, 5)]
    assert runs([True]) == [(0, 1)]
    assert runs([]) == runs([False]) == []
