"""What generation is asked for."""

from loaders.host.sampling import seed_bits


def test_every_bit_of_a_seed_counts():
    long = [seed_bits(7 + (high << 32)) for high in range(1000)]
    assert long[0] == 7
    assert len(set(long)) == 1000
    assert all(0 <= bits < 2**32 for bits in long)
