import torch
from torch import nn

from model.baselines.inputs import bilstm
from model.baselines.suopentag import attended


def test_each_token_is_scaled_by_its_cosine_to_the_attribute():
    states = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]]])
    attribute = torch.tensor([[2.0, 0.0]])  # cosines 3/5, 0, -1; that of nothing is 0
    wanted = [[3, 4, 1.8, 2.4], [0, 2, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(attended(states, attribute)[0], torch.tensor(wanted, dtype=torch.float))


def test_padding_changes_neither_states_nor_the_last_of_both_directions():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 2, batch_first=True, bidirectional=True)
    short, long = torch.randn(1, 2, 3), torch.randn(1, 5, 3)
    x = torch.cat([nn.functional.pad(short, (0, 0, 0, 3), value=9.0), long])
    states, last = bilstm(lstm, x, torch.arange(5) < torch.tensor([[2], [5]]))
    alone, _ = lstm(short)
    torch.testing.assert_close(states[0, :2], alone[0])
    assert (states[0, 2:] == 0).all()
    torch.testing.assert_close(last[0], torch.cat([alone[0, -1, :2], alone[0, 0, 2:]]))
