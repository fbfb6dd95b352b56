from compress.pruning.choose import choose
from compress.pruning.ranking import Ranking


def test_choose_removes_the_lowest_blocks_and_puts_back_what_still_fits() -> None:
    ranked = [
        Ranking(order=[0, 1, 2, 3], scores=[0.1, 0.2, 0.8, 0.9], widths=[4, 2]),
        Ranking(order=[0, 1], scores=[0.3, 0.6], widths=[2, 1]),
    ]
    prices = [1, 10]

    def cost(stay: list[int]) -> int:
        return sum(price * count for price, count in zip(prices, stay, strict=True))

    assert choose(ranked, cost, most=24, scope="global") == [4, 2]
    assert choose(ranked, cost, most=22, scope="global") == [2, 2]
    # The first block alone is not enough; with the second gone it fits again.
    assert choose(ranked, cost, most=14, scope="global") == [4, 1]
    assert choose(ranked, cost, most=12, scope="global") == [2, 1]
    assert choose(ranked, cost, most=14, scope="local") == [2, 1]
