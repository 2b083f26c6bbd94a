/**
 * What every page needs: elements whose text is always text, numbers as people read them, and the data.
 *
 * Pages open from files, where neither fetch() nor modules work: data are scripts that assign to `EludeData`, loaded
 * when they are first asked for. One global, `Elude`, holds everything that pages share.
 */
window.EludeData = window.EludeData || {};
window.Elude = (function () {
  "use strict";
  const NONCE = document.currentScript.nonce;
  const SVG = "http://www.w3.org/2000/svg";
  const loading = new Map();

  /** Fill an element. attributes: `class`, `style` (an object), `on...` (a listener), or any other; null is left out. */
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(9).filter((c) => c !== null && c !== undefined && c !== false));
    return node;
  }

  /**
   * An element. Strings among the children become text, never markup.
   * @param {string} tag
   * @param {Object} [attributes]
   * @param {...(Node | string | Array | null)} children
   * @returns {HTMLElement}
   */
  function el(tag, attributes, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }

  /** The same for drawings. @returns {SVGElement} */
  function svg(tag, attributes, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
  }

  /** A minus sign as wide as the digits. */
  function minus(text) {
    return text.replace("-", "\u2212");
  }

  const format = {
    /** Three figures, `–` where there is none. */
    number(value, digits = 3) {
      if (value === null || value === undefined || !Number.isFinite(value)) return "–";
      if (value === 0) return "0";
      const size = Math.abs(value);
      if (size < 1e-4 || size >= 1e6) return minus(value.toExponential(1));
      return minus(value.toFixed(Math.max(0, Math.min(6, digits - 1 - Math.floor(Math.log10(size))))));
    },
    /** The same with its sign. */
    signed(value, digits = 3) {
      return value > 0 ? "+" + format.number(value, digits) : format.number(value, digits);
    },
    percent(value) {
      if (value === null || value === undefined || !Number.isFinite(value)) return "–";
      const p = 100 * value;
      return (
        (p === 0 ? "0" : p >= 10 ? p.toFixed(0) : p >= 0.1 ? p.toFixed(1) : p >= 0.01 ? p.toFixed(2) : "< 0.01") + " %"
      );
    },
    count(value) {
      return value.toLocaleString("en");
    },
  };

  /**
   * One file of data, `data/NAME.js`, which sets EludeData[NAME].
   * @param {string} name
   * @returns {Promise<any>} rejected where the file is missing or holds something else
   */
  function load(name) {
    if (!loading.has(name)) {
      loading.set(
        name,
        new Promise((resolve, reject) => {
          const missing = () => reject(new Error(`data/${name}.js is missing or damaged; make the report again.`));
          if (name in EludeData) return resolve(EludeData[name]);
          const script = document.createElement("script");
          script.nonce = NONCE;
          script.src = `data/${name}.js`;
          script.onload = () => (name in EludeData ? resolve(EludeData[name]) : missing());
          script.onerror = missing;
          document.head.append(script);
        }),
      );
    }
    return loading.get(name);
  }

  /**
   * Where there is nothing to show: what is missing, why, and the command that makes it.
   * @param {string} title
   * @param {string} [text]
   * @param {string} [command]
   */
  function state(title, text, command) {
    return el(
      "div",
      { class: "state", role: "status" },
      el("strong", null, title),
      text && el("p", null, text),
      command && el("code", { class: "command" }, command),
    );
  }

  /**
   * A part of a page with its heading.
   * @param {string} title
   * @param {string} [note]  a sentence below it
   * @param {...(Node | null)} content
   */
  function section(title, note, ...content) {
    return el("section", null, sectionHead(title, note), ...content);
  }

  /** The heading alone, with controls beside it. */
  function sectionHead(title, note, ...controls) {
    return el("div", { class: "section-head" }, el("h2", null, title), ...controls, note && el("p", null, note));
  }

  /** Items of which the first are shown, and the others when somebody asks. */
  function list(items, make, kind, shown = 12) {
    const box = el("div", { class: kind }, items.slice(0, shown).map(make));
    if (items.length <= shown) return box;
    const all = () => {
      more.remove();
      box.append(...items.slice(shown).map(make));
    };
    const more = el(
      "p",
      null,
      el("button", { class: "button", type: "button", onclick: all }, `Show all ${format.count(items.length)}`),
    );
    return el("div", null, box, more);
  }

  /** Run a page's drawing; what goes wrong stands in the page. */
  async function page(draw) {
    try {
      await draw();
    } catch (error) {
      document.getElementById("main").append(state("This page could not be drawn.", error.message));
      throw error;
    }
  }

  /** Tell whoever waits, a test or a measurement, that the page shows what its address asks for. */
  function ready(what = "yes") {
    document.documentElement.dataset.ready = what;
    performance.mark("ready");
  }

  /** A name in the part of an address after #, slashes kept readable. */
  function hash(name) {
    return "#" + encodeURIComponent(name).replaceAll("%2F", "/");
  }

  /** The part of this page's address after #, decoded; a damaged one as it stands. */
  function fromHash() {
    const text = location.hash.slice(1);
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }

  document.addEventListener("keydown", (event) => {
    const typing =
      event.target instanceof Element && event.target.closest("input, select, textarea, [contenteditable]");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const field = [...document.querySelectorAll('input[type="search"]')].find((input) => input.offsetParent);
    if (field) {
      event.preventDefault();
      field.focus();
      field.select();
    }
  });
  const jump = document.getElementById("jump");
  if (jump) {
    jump.addEventListener("submit", (event) => {
      event.preventDefault();
      const link = el("a", { href: "features.html#q=" + encodeURIComponent(jump.querySelector("input").value) });
      document.body.append(link); // a click, so that the theme comes along
      link.click();
      link.remove();
    });
  }

  return { el, svg, format, load, state, section, sectionHead, list, page, ready, hash, fromHash };
})();
