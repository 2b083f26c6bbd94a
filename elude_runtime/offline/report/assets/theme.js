/**
 * Light or dark, before the first paint: what was chosen, else what the system prefers.
 * A choice is kept in localStorage and, since pages from files may not share that, in the links between pages.
 */
(function () {
  "use strict";
  const KEY = "elude-theme";
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  /** @returns {string | null} the chosen theme: the stored one, else that of this page's address */
  function chosen() {
    let kept = null;
    try {
      kept = localStorage.getItem(KEY);
    } catch {
      // switched off, or not given to pages from files
    }
    kept = kept || new URLSearchParams(location.search).get("theme");
    return kept === "light" || kept === "dark" ? kept : null;
  }

  let choice = chosen();

  function show() {
    root.dataset.theme = choice || (dark.matches ? "dark" : "light");
  }

  /** Take the choice along to another page of this report. */
  function carry(event) {
    const link = event.target instanceof Element ? event.target.closest("a[href]") : null;
    if (choice && link && /^[\w-]+\.html/.test(link.getAttribute("href"))) link.search = "?theme=" + choice;
  }

  show();
  dark.addEventListener("change", show);
  document.addEventListener("click", carry, true);
  document.addEventListener("auxclick", carry, true);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      choice = root.dataset.theme === "dark" ? "light" : "dark";
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // the links between pages carry it
      }
      show();
    });
  });
})();
