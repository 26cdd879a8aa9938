"""Workers in one process: they take turns, have their own random numbers, and stop together."""

import pytest
import torch

from lingrad.decentralized import Workers, simulate
from lingrad.errors import ExchangeError, SpecError


def test_each_gets_what_all_give():
    def work(workers):
        given = [torch.tensor([workers.number, step]) for step in range(3)]
        return [{k: v[0].tolist() for k, v in workers.gather(lambda one=one: [one]).items()} for one in given]

    found = simulate(work, 3)
    assert found == [[{k: [k, step] for k in range(3)} for step in range(3)]] * 3


def test_tensors_of_all_dtypes_and_shapes():
    def work(workers):
        given = [torch.tensor(3.5), torch.arange(3, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.bfloat16)]
        given.append(torch.zeros(0, 4))
        given.append(torch.arange(6.0).view(2, 3).t())  # not contiguous
        (found,) = workers.gather(lambda: given).values()
        for own, other in zip(given, found, strict=True):
            assert own.dtype == other.dtype
            assert torch.equal(own, other)
        return workers.sent

    assert simulate(work, 1) == [0]


def test_one_runs_at_a_time_in_the_order_of_numbers():
    order = []

    def work(workers):
        for step in range(2):
            order.append((workers.number, step))
            workers.gather(lambda: [torch.zeros(1)])

    simulate(work, 3)
    assert order == [(number, step) for step in range(2) for number in range(3)]


def test_random_numbers_are_each_workers_own():
    """As in processes that begin with one seed; the caller's are left as they were."""

    def work(workers):
        found = []
        for _ in range(3):
            found += torch.rand(2).tolist()
            workers.gather(lambda: [torch.zeros(1)])
        return found

    torch.manual_seed(7)
    found = simulate(work, 3)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert after == torch.rand(1)
    torch.manual_seed(7)
    expected = [number for _ in range(3) for number in torch.rand(2).tolist()]
    assert found == [expected] * 3


def test_one_that_leaves_is_missing():
    def work(workers):
        seen = []
        for step in range(3):
            if step == workers.number:  # worker 0 at once, worker 1 after one exchange
                return seen
            seen.append(list(workers.gather(lambda: [torch.zeros(1)])))
        return seen

    assert simulate(work, 3) == [[], [[1, 2]], [[1, 2], [2]]]


def test_an_error_of_one_stops_all():
    def work(workers):
        workers.gather(lambda: [torch.zeros(1)])
        if workers.number == 1:
            raise ValueError("of worker 1")
        workers.gather(lambda: [torch.zeros(1)])

    with pytest.raises(ValueError, match="of worker 1"):
        simulate(work, 3)


def test_messages_of_other_sizes():
    message = "worker 0 sends 4 bytes and worker 1 sends 8: their models, rules or options of Rounds differ"
    with pytest.raises(ExchangeError, match=message):
        simulate(lambda workers: workers.gather(lambda: [torch.zeros(1 + workers.number)]), 2)


def test_two_that_say_one_number():
    def work(workers):
        workers.number = 1
        workers.gather(lambda: [torch.zeros(1)])

    message = "two workers say that they are number 1, and would train one slice twice; give each a number of its own, from 0"
    with pytest.raises(ExchangeError, match=message):
        simulate(work, 2)


def test_how_many():
    with pytest.raises(SpecError, match="workers must be 1 or more, not 0"):
        simulate(lambda _: None, 0)


def test_a_number_is_a_whole_number():
    class Alone(Workers):
        def gather(self, give):
            return {self.number: list(give())}

    with pytest.raises(SpecError, match="number must be a worker's, from 0, not -1"):
        Alone(-1)
