"""The folder of vectors in programs that read Parquet: the same numbers, without torch."""

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl

expected = np.load("projected.npy")
glob = "vectors/*.parquet"
read = duckdb.sql(f"SELECT embedding FROM read_parquet('{glob}')").fetchnumpy()["embedding"]
own = "[" + ",".join(map(str, expected[0].tolist())) + f"]::FLOAT[{expected.shape[1]}]"
cosines = duckdb.sql(
    f"SELECT array_inner_product(embedding::FLOAT[{expected.shape[1]}], {own}) AS c FROM read_parquet('{glob}')"
)
by_split = datasets.load_dataset("vectors", cache_dir="datasets")  # named after the files
found = {
    f"duckdb {duckdb.__version__}": np.stack(read),
    f"polars {pl.__version__}": pl.scan_parquet("vectors").collect()["embedding"].to_numpy(),
    f"datasets {datasets.__version__}": np.array(by_split["test"]["embedding"][:]),
    f"pandas {pd.__version__}": np.stack(pd.read_parquet("vectors")["embedding"]),
}
for name, vectors in found.items():
    difference = np.abs(vectors - expected).max()
    assert difference < 1e-5, (name, difference)
    print(f"{name}: largest difference {difference:.1e}")
difference = np.abs(cosines.fetchnumpy()["c"] - expected @ expected[0]).max()
assert difference < 1e-5, difference
print(f"duckdb's array_inner_product: largest difference {difference:.1e}")
