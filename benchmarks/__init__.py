"""Each module measures one thing beside its peer and prints one JSON line: python -m benchmarks.NAME"""
