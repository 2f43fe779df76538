"""Golden values of centring and principal components: means, components, variances and projected rows of unit length.

Written with Python 3.11.7, numpy and scikit-learn of the versions that the output states. Rows come from formula.py: a large
common part, factors that fade, and noise, so that all variances differ. Components are the right singular vectors of the
centred rows in f64, which scikit-learn's PCA repeats. Run: python tests/golden/pca.py > tests/golden/pca.json
"""

import json

import numpy as np
import sklearn
from sklearn.decomposition import PCA

from formula import fingerprint, values

# (rows, width, components): more rows than columns, fewer, and a width that is no multiple of anything.
CASES = [(300, 24, 6), (40, 64, 12), (530, 37, 37)]


def rows(count, width):
    factors = values("pca factors", (count, width), -1.0, 1.0).astype(np.float64)
    loadings = values("pca loadings", (width, width), -1.0, 1.0).astype(np.float64)
    mean = values("pca mean", (width,), 1.0, 4.0).astype(np.float64)
    return ((factors * 0.8 ** np.arange(width)) @ loadings + mean).astype(np.float32)


def unit(xs):
    return xs / np.linalg.norm(xs, axis=1, keepdims=True)


def main():
    cases = []
    for count, width, dim in CASES:
        xs = rows(count, width).astype(np.float64)
        mean = xs.mean(0)
        _, singular, components = np.linalg.svd(xs - mean, full_matrices=False)
        variances = singular**2 / (count - 1)
        components = components[:dim]
        top = np.abs(components).argmax(1)
        components *= np.sign(components[np.arange(dim), top])[:, None]
        peer = PCA(n_components=dim, svd_solver="full").fit(xs)
        assert np.allclose(np.abs((peer.components_ * components).sum(1)), 1.0)
        assert np.allclose(peer.explained_variance_, variances[:dim])
        cases.append(
            {
                "rows": count,
                "width": width,
                "components": dim,
                "mean": [float(x) for x in mean],
                "variances": [float(x) for x in variances[:dim]],
                "total_variance": float(variances.sum()),
                "component_fingerprint": fingerprint("components", components),
                "centred_fingerprint": fingerprint("centred", unit(xs - mean)),
                "reduced_fingerprint": fingerprint("reduced", unit((xs - mean) @ components.T)),
            }
        )
    print(json.dumps({"versions": {"numpy": np.__version__, "scikit_learn": sklearn.__version__}, "cases": cases}))


if __name__ == "__main__":
    main()
