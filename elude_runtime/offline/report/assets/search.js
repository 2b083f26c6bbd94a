/**
 * Search in labels and names, in the order of the service's own search (`FeatureCatalogue.search`).
 *
 * Best first: labels and names that are it; labels that begin with it and names that end in it; labels with a word that
 * begins with it; labels and names that hold it; where there is nothing of the kind, concepts whose label or name is
 * much like it. Among equals concepts come before sub-units.
 */
(function () {
  "use strict";
  const LONGEST = 200;
  const NO_MATCH = 9;
  const CLOSE = 0.6;
  const WORD = /[\p{L}\p{N}_]/u;

  /** Whether a word begins at this place of the text, as Python's \b sees it. */
  function isBoundary(text, at) {
    const before = at > 0 && WORD.test(lastCharacter(text.slice(0, at)));
    const after = at < text.length && WORD.test(String.fromCodePoint(text.codePointAt(at)));
    return before !== after;
  }

  function lastCharacter(text) {
    const tail = text.slice(-2);
    return tail.length === 2 && tail.codePointAt(0) > 0xffff ? tail : text.slice(-1);
  }

  function labelRank(label, query) {
    let at = label.indexOf(query);
    if (at < 0) return NO_MATCH;
    if (label === query) return 0;
    if (at === 0) return 1;
    for (; at >= 0; at = label.indexOf(query, at + 1)) if (isBoundary(label, at)) return 2;
    return 3;
  }

  function nameRank(name, query) {
    if (!name.includes(query)) return NO_MATCH;
    if (name === query) return 0;
    return name.endsWith("/" + query) ? 1 : 3;
  }

  /** The longest run that both share in these ranges, the first one in `a`, then in `b`. */
  function longestMatch(a, [alo, ahi], places, [blo, bhi]) {
    let best = [alo, blo, 0];
    let before = new Map();
    for (let i = alo; i < ahi; i++) {
      const now = new Map();
      for (const j of places.get(a[i]) || []) {
        if (j < blo) continue;
        if (j >= bhi) break;
        const size = (before.get(j - 1) || 0) + 1;
        now.set(j, size);
        if (size > best[2]) best = [i - size + 1, j - size + 1, size];
      }
      before = now;
    }
    return best;
  }

  /** Python's difflib.SequenceMatcher(a=text, b=query).ratio(): twice the characters in common over all (Ratcliff). */
  class Likeness {
    constructor(query) {
      this.query = Array.from(query);
      this.places = new Map();
      this.query.forEach((c, j) => this.places.set(c, [...(this.places.get(c) || []), j]));
    }
    ratio(text) {
      const a = Array.from(text);
      const total = a.length + this.query.length;
      if (!a.length || (2 * Math.min(a.length, this.query.length)) / total < CLOSE || this.bound(a) / total < CLOSE)
        return 0;
      let common = 0;
      const left = [[0, a.length, 0, this.query.length]];
      while (left.length) {
        const [alo, ahi, blo, bhi] = left.pop();
        const [i, j, size] = longestMatch(a, [alo, ahi], this.places, [blo, bhi]);
        if (!size) continue;
        common += size;
        if (alo < i && blo < j) left.push([alo, i, blo, j]);
        if (i + size < ahi && j + size < bhi) left.push([i + size, ahi, j + size, bhi]);
      }
      return (2 * common) / total;
    }
    /** Twice the characters in common, whatever their order: never less than the ratio's. */
    bound(a) {
      const left = new Map([...this.places].map(([c, places]) => [c, places.length]));
      let common = 0;
      for (const c of a) {
        const n = left.get(c) || 0;
        if (n) {
          left.set(c, n - 1);
          common++;
        }
      }
      return 2 * common;
    }
  }

  class Search {
    /** @param {{names: string[], data: Object, count: number, isConcept: (row: number) => boolean}} features */
    constructor(features) {
      this.features = features;
      this.labels = features.data.label.values.map((text) => text.toLowerCase());
      this.names = features.names.map((name) => name.toLowerCase());
    }

    /**
     * Rows that a query finds among these, best first; all of them, in their order, for an empty one.
     * @param {string} query
     * @param {number[]} rows  in the table's order
     * @returns {number[]}
     */
    find(query, rows) {
      const wanted = Array.from(query.trim()).slice(0, LONGEST).join("").toLowerCase();
      if (!wanted) return rows;
      const ofLabel = this.labels.map((label) => labelRank(label, wanted));
      const { codes } = this.features.data.label;
      const found = Array.from({ length: 8 }, () => []); // by rank, concepts before sub-units
      for (const row of rows) {
        const rank = Math.min(ofLabel[codes[row]], nameRank(this.names[row], wanted));
        if (rank < NO_MATCH) found[2 * rank + (this.features.isConcept(row) ? 0 : 1)].push(row);
      }
      const hits = found.flat();
      return hits.length ? hits : this.muchLike(wanted, rows);
    }

    /** Concepts whose label or name (without its layer) is most like the query, best first. */
    muchLike(wanted, rows) {
      const likeness = new Likeness(wanted);
      const near = [];
      for (const row of rows) {
        if (!this.features.isConcept(row)) continue;
        const name = this.names[row];
        const close = Math.max(
          likeness.ratio(this.labels[this.features.data.label.codes[row]]),
          likeness.ratio(name),
          likeness.ratio(name.slice(name.lastIndexOf("/") + 1)),
        );
        if (close >= CLOSE) near.push([close, row]);
      }
      return near.sort((x, y) => y[0] - x[0]).map(([, row]) => row);
    }
  }

  Elude.Search = Search;
})();
