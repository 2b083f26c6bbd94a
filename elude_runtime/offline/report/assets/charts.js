/** Bars and small charts: plain elements and SVG, coloured by the tokens of base.css. */
(function () {
  "use strict";
  const { el, svg, format } = Elude;

  /**
   * One bar. signed: from the middle to either side, else from the left.
   * @param {number} value
   * @param {number} largest  the value of a full bar
   */
  function bar(value, largest, signed = false) {
    const size = largest > 0 ? Math.min(1, Math.abs(value) / largest) : 0;
    const width = 100 * size * (signed ? 0.5 : 1);
    const left = signed ? (value < 0 ? 50 - width : 50) : 0;
    const tone = signed ? (value < 0 ? "negative" : "positive") : "";
    return el(
      "span",
      { class: signed ? "bar signed" : "bar", "aria-hidden": "true" },
      el("i", { class: tone, style: { left: `${left}%`, width: `${width}%` } }),
    );
  }

  /**
   * Rows of name, bar and value.
   * @param {Array<{name: string | Node, value: number, text?: string}>} rows
   * @param {{signed?: boolean, largest?: number}} [options]
   */
  function bars(rows, { signed = false, largest } = {}) {
    const full = largest ?? Math.max(0, ...rows.map((row) => Math.abs(row.value)));
    const row = ({ name, value, text }) =>
      el(
        "div",
        { class: "bars-row", role: "listitem" },
        el("span", { class: "name" }, name),
        bar(value, full, signed),
        el("span", { class: "value" }, text ?? (signed ? format.signed(value) : format.number(value))),
      );
    return el("div", { class: "bars", role: "list" }, rows.map(row));
  }

  /**
   * Values as thin bars side by side, in the order given, with the largest value named at the side.
   * @param {Array<{value: number, title: string, href?: string, quiet?: boolean}>} items
   * @param {{label: string, number?: (value: number) => string, ends?: [string, string]}} options  ends: below the first
   *   and the last bar
   */
  function columns(items, { label, number = format.number, ends = ["", ""] }) {
    const height = 100;
    const full = Math.max(1e-12, ...items.map((item) => item.value));
    const gap = items.length > 60 ? 0.15 : 0.1;
    const marks = items.map((item, i) => {
      const size = Math.max(item.value > 0 ? 1 : 0, (item.value / full) * height);
      const place = { x: i + gap / 2, y: (height - size).toFixed(2), width: 1 - gap, height: size.toFixed(2) };
      const mark = svg("rect", { class: item.quiet ? "mark quiet" : "mark", ...place }, svg("title", null, item.title));
      return item.href ? svg("a", { href: item.href, tabindex: "-1" }, mark) : mark;
    });
    return el(
      "div",
      { class: "columns" },
      el("span", { class: "top-value" }, number(full)),
      el("span", { class: "bottom-value" }, "0"),
      svg(
        "svg",
        {
          class: "chart",
          viewBox: `0 0 ${items.length || 1} ${height}`,
          preserveAspectRatio: "none",
          role: "img",
          "aria-label": label,
        },
        marks,
      ),
      el("span", { class: "ends-row" }, el("span", null, ends[0]), el("span", null, ends[1])),
    );
  }

  /** How many values fall into each of `count` equal intervals: `{counts, low, high}`. */
  function intervals(values, count) {
    const low = Math.min(...values);
    const high = Math.max(...values);
    const counts = new Array(count).fill(0);
    for (const value of values) counts[Math.min(count - 1, Math.floor(((value - low) / (high - low || 1)) * count))]++;
    return { counts, low, high };
  }

  /**
   * A histogram with its two ends named.
   * @param {number[]} values
   * @param {{label: string, count?: number, number?: (value: number) => string}} options
   */
  function histogram(values, { label, count = 40, number = format.number }) {
    if (!values.length) return el("p", { class: "soft" }, "None.");
    const { counts, low, high } = intervals(values, count);
    const width = (high - low) / count;
    return columns(
      counts.map((n, i) => ({
        value: n,
        title: `${format.count(n)} from ${number(low + i * width)} to ${number(low + (i + 1) * width)}`,
      })),
      { label, number: (n) => format.count(Math.round(n)), ends: [number(low), number(high)] },
    );
  }

  /**
   * Quantiles 1, 5, 25, 50, 75, 95, 99 % as nested bars; the median is a line, zero a mark.
   * @param {number[]} q
   * @param {number} mean
   */
  function spread(q, mean) {
    const width = 280;
    const room = 8;
    const low = Math.min(0, q[0]);
    const high = Math.max(0, q[6]);
    const x = (v) => room + ((v - low) / (high - low || 1)) * (width - 2 * room);
    const nested = [[q[0], q[6], 16, 8], [q[1], q[5], 12, 16], [q[2], q[4], 8, 24]]; // prettier-ignore
    const title = `1 % ${format.number(q[0])}, 5 % ${format.number(q[1])}, 25 % ${format.number(q[2])}, median ${format.number(q[3])}, 75 % ${format.number(q[4])}, 95 % ${format.number(q[5])}, 99 % ${format.number(q[6])}; mean ${format.number(mean)}`;
    return svg(
      "svg",
      {
        class: "chart spread",
        viewBox: `0 0 ${width} 52`,
        role: "img",
        "aria-label": `Quantiles of the activation: ${title}`,
      },
      svg("title", null, title),
      nested.map(([a, b, y, height], i) =>
        svg("rect", { class: `quantile q${i}`, x: x(a), y, width: Math.max(1, x(b) - x(a)), height, rx: 2 }),
      ),
      svg("line", { class: "median", x1: x(q[3]), x2: x(q[3]), y1: 8, y2: 32 }),
      svg("line", { class: "axis", x1: x(0), x2: x(0), y1: 4, y2: 36 }),
      svg("text", { x: x(q[0]), y: 48, class: q[0] < 0 ? "negative-text" : "" }, format.number(q[0])),
      svg(
        "text",
        { x: x(q[6]), y: 48, "text-anchor": "end", class: q[6] > 0 ? "positive-text" : "" },
        format.number(q[6]),
      ),
      Math.abs(x(0) - x(q[0])) > 40 &&
        Math.abs(x(0) - x(q[6])) > 40 &&
        svg("text", { x: x(0), y: 48, "text-anchor": "middle" }, "0"),
    );
  }

  Elude.charts = { bar, bars, columns, histogram, spread };
})();
