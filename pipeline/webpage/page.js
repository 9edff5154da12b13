"use strict";
// Before anything is drawn: that there is a script, and the theme that was chosen the last time.
document.documentElement.classList.add("js");
const stored = (value) => {
  try { // a browser may keep nothing for pages from files
    if (value === undefined) return localStorage.getItem("theme");
    localStorage.setItem("theme", value);
  } catch { /* then the choice lasts as long as the page */ }
  return value;
};
const show = (theme) => {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
};
show(stored());
// The rest runs when the page is there.
(() => {
  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  const name = () => document.documentElement.dataset.theme || "auto";
  const label = () => { button.textContent = `Theme: ${name()}`; };
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(name()) + 1) % themes.length];
    stored(next);
    show(next);
    label();
  });
  label();

  for (const control of document.querySelectorAll("[data-unfold]")) {
    const table = document.getElementById(control.dataset.unfold);
    const words = control.textContent;
    control.addEventListener("click", () => {
      const folded = table.classList.toggle("folded");
      control.setAttribute("aria-expanded", String(!folded));
      control.textContent = folded ? words : words.replace("Show", "Hide");
    });
  }

  for (const gallery of document.querySelectorAll("[data-gallery]")) {
    const slider = gallery.querySelector("input");
    const columns = [...gallery.querySelectorAll("figure")].map((one) => [...one.querySelectorAll(".frame")]);
    const turn = () => {
      const at = slider ? Number(slider.value) : 0;
      for (const frames of columns) frames.forEach((frame, i) => { frame.hidden = i !== at; });
      if (!slider) return;
      const value = slider.dataset.values.split("|")[at];
      slider.setAttribute("aria-valuetext", value);
      gallery.querySelector("output").textContent = value;
    };
    gallery.classList.add("live");
    if (slider) slider.addEventListener("input", turn);
    turn();
  }

  // A link to something folded away opens what it lies in.
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    let opened = false;
    for (let above = target; above; above = above.parentElement) {
      if (above.tagName === "DETAILS" && !above.open) { above.open = true; opened = true; }
    }
    if (opened) target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();

  // On a narrow screen the contents start folded; page.css hides them until then, so that nothing moves while the page loads.
  const contents = document.querySelector("nav details");
  const narrow = matchMedia("(max-width: 75rem)");
  const fit = () => { contents.open = !narrow.matches; };
  narrow.addEventListener("change", fit);
  contents.addEventListener("click", (event) => { if (narrow.matches && event.target.tagName === "A") contents.open = false; });
  fit();
  contents.classList.add("fitted");
})();
