"""Linear probe: what the stored region features tell without the model.

One multinomial logistic regression per attribute on [whole image | mean over regions], trained
on the `visible` values of the training split and scored on those of the test split. Standing
beside the model's F1 on visible values, it tells a weak extractor from a weak model.
"""

from collections import defaultdict

import numpy as np

from model.examples import Product, Question
from model.metrics import normalise


def pool(product: Product) -> np.ndarray | None:
    """(2 * width,) float32: the whole image's features, then the mean of all regions; None: no image."""
    if product.regions is None or not len(product.regions):
        return None
    regions = product.regions.astype(np.float32)  # (R, width)
    return np.concatenate([regions[-1], regions.mean(axis=0)])


def visible_value(question: Question) -> str | None:
    """The first value that only the picture shows, normalised."""
    pairs = zip(question.values, question.origins, strict=True)
    return next((normalise(value) for value, origin in pairs if origin == "visible"), None)


class Probe:
    """`observe` every training question, `fit` once, then `predict`."""

    def __init__(self) -> None:
        self._features: defaultdict[str, list[np.ndarray]] = defaultdict(list)
        self._labels: defaultdict[str, list[str]] = defaultdict(list)
        self._classifiers: dict = {}

    def observe(self, question: Question) -> None:
        label = visible_value(question)
        if not label:
            return
        features = pool(question.product)
        if features is not None:
            self._features[question.attribute].append(features)
            self._labels[question.attribute].append(label)

    def fit(self) -> None:
        """Deterministic: one thread, and a solver without chance."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits

        with threadpool_limits(limits=1):
            for attribute, labels in self._labels.items():
                if len(set(labels)) > 1:
                    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
                    classifier.fit(np.stack(self._features[attribute]), labels)
                    self._classifiers[attribute] = classifier

    def predict(self, question: Question) -> tuple[str, ...]:
        """At most one normalised value; none without an image or without training values."""
        labels = self._labels.get(question.attribute)
        features = pool(question.product) if labels else None
        if features is None or not labels:
            return ()
        classifier = self._classifiers.get(question.attribute)
        return (str(classifier.predict(features[None])[0]),) if classifier else (labels[0],)
