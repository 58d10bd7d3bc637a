"""iTPN's tables of relative position biases for other grids than they were trained on."""

import torch

from stages.model.itpn import relative_index, resize_bias_table


def offsets(n: int) -> torch.Tensor:
    return torch.arange(2 * n - 1) - (n - 1.0)


def test_a_resized_table_keeps_its_centre_its_axes_and_its_heads():
    rows, columns = offsets(6).view(-1, 1).expand(11, 11), offsets(6).view(1, -1).expand(11, 11)
    maps = torch.stack([rows**2, columns, torch.full((11, 11), 7.0), rows * columns])
    resized = resize_bias_table(maps.flatten(1).t().contiguous(), (10, 8)).t().view(4, 19, 15)
    squares, sides, same, mixed = resized
    torch.testing.assert_close(squares, squares[:, :1].expand(19, 15))  # of rows only
    torch.testing.assert_close(sides, sides[:1].expand(19, 15))  # of columns only
    torch.testing.assert_close(same, torch.full((19, 15), 7.0))
    assert abs(squares[9, 7]) < 0.1 and sides[0, 7].abs() < 1e-4 and abs(mixed[9, 7]) < 1e-4
    # An offset of k of the new grid is one of k · 11/15 of the old one; torch's cubic bends a straight line a little.
    torch.testing.assert_close(sides[0, 3:12], offsets(8)[3:12] * 11 / 15, rtol=0, atol=0.06)
    torch.testing.assert_close(squares, squares.flip(0), rtol=1e-4, atol=1e-4)


def test_a_table_that_fits_is_taken_as_it_is_and_indexed_by_relative_position():
    table = torch.randn(49, 2)
    assert resize_bias_table(table, (4, 4)) is table
    index = relative_index((4, 4))
    for a, b in ((0, 5), (7, 2), (15, 0)):
        row, column = a // 4 - b // 4 + 3, a % 4 - b % 4 + 3
        assert index[a, b] == row * 7 + column
