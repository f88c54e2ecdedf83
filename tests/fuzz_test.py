from tests.benchmarks import fuzz


def test_damaged_files_are_refused_or_masked_and_nothing_wrong_is_served():
    table = fuzz.fuzz(inputs=48, seed=1)
    assert all(sum(counts.values()) for counts in table.values())  # every kind has had its turn
    for kind, counts in table.items():
        assert not any(counts[name] for name in fuzz.FAILURES), kind
