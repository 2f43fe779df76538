"""Golden values of the weighted cosine k-NN, by scikit-learn's brute-force classifier.

Written with Python 3.11.7 and scikit-learn 1.9.1; the output states the version. Seed: the salts below. Features come from the formula in
linear_probe.py, which the Rust test repeats. Run: python tests/golden/knn.py > tests/golden/knn.json
"""

import json

import numpy as np
import sklearn
from sklearn.neighbors import KNeighborsClassifier

from linear_probe import value

TRAIN, QUERIES, WIDTH, CLASSES = 400, 120, 16, 9
TEMPERATURE = 0.07


def features(count, salt):
    labels = np.arange(count) % CLASSES
    noise = value(np.arange(count * WIDTH), salt).reshape(count, WIDTH)
    signal = (np.arange(WIDTH)[None, :] % CLASSES == labels[:, None]) * 0.3
    return (noise + signal).astype(np.float32).astype(np.float64), labels


def main():
    xs, ys = features(TRAIN, 11)
    queries, truth = features(QUERIES, 12)
    results = []
    for k in [1, 5, 10, 20, 200]:
        model = KNeighborsClassifier(
            n_neighbors=k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1.0 - distance) / TEMPERATURE),
        )
        votes = model.fit(xs, ys).predict_proba(queries)
        ranked = np.argsort(-votes, axis=1, kind="stable")
        voted = np.take_along_axis(votes, ranked, axis=1) > 0
        hit = (ranked == truth[:, None]) & voted
        results.append({"k": k, "top1": 100.0 * hit[:, :1].any(1).mean(), "top5": 100.0 * hit[:, :5].any(1).mean()})
    distances, indices = model.kneighbors(queries[:8], 5)
    print(
        json.dumps(
            {
                "scikit_learn": sklearn.__version__,
                "temperature": TEMPERATURE,
                "results": results,
                "nearest": indices.flatten().tolist(),
                "similarities": (1.0 - distances).flatten().tolist(),
            }
        )
    )


if __name__ == "__main__":
    main()
