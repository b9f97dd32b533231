// Measures the page as it is drawn; the tests judge.
"use strict";

const shown = element => element.getClientRects().length > 0;
const box = element => {
  const r = element.getBoundingClientRect();
  return {left: r.left, right: r.right, top: r.top, bottom: r.bottom};
};

function colour(text) {
  const [red, green, blue, alpha = 1] = text.match(/[\d.]+/g).map(Number);
  return {rgb: [red, green, blue], alpha};
}
function over(front, back) {
  return front.rgb.map((part, at) => part * front.alpha + back[at] * (1 - front.alpha));
}
function ground(element) {
  if (!element) return [255, 255, 255];
  const own = colour(getComputedStyle(element).backgroundColor);
  return own.alpha === 1 ? own.rgb : over(own, ground(element.parentElement));
}
function luminance(rgb) {
  const [red, green, blue] = rgb.map(part => {
    const share = part / 255;
    return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
// https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio
function contrast(first, second) {
  const [low, high] = [luminance(first), luminance(second)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
function opacity(element) {
  return element ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1;
}
function paint(element, property) {
  const style = getComputedStyle(element);
  if (style[property] === "none") return 0;
  const found = colour(style[property]);
  found.alpha *= Number(style[property + "Opacity"]) * opacity(element);
  return contrast(over(found, ground(element)), ground(element));
}
function ownText(element) {
  return [...element.childNodes].filter(node => node.nodeType === Node.TEXT_NODE).map(node => node.data).join("").trim();
}
function texts() {
  return [...document.body.querySelectorAll("*:not(script):not(style):not(title)")]
    .filter(element => ownText(element) && shown(element))
    .map(element => {
      const style = getComputedStyle(element);
      const ink = colour(element.closest("svg") ? style.fill : style.color);
      ink.alpha *= opacity(element);
      const back = ground(element);
      return {text: ownText(element).slice(0, 60), contrast: contrast(over(ink, back), back)};
    });
}
function plots() {
  return [...document.querySelectorAll("svg")].filter(shown).map(svg => {
    const scale = box(svg).right - box(svg).left;
    return {
      title: svg.getAttribute("aria-label"),
      frame: box(svg),
      texts: [...svg.querySelectorAll("text")].map(text => ({
        text: text.textContent,
        size: parseFloat(getComputedStyle(text).fontSize) * scale / svg.viewBox.baseVal.width,
        ...box(text),
      })),
      marks: [...svg.querySelectorAll("polyline, circle, rect, path.interval, line.whisker")].map(mark => ({
        kind: mark.tagName,
        note: mark.querySelector("title")?.textContent ?? "",
        contrast: Math.max(paint(mark, "fill"), paint(mark, "stroke")),
        ...box(mark),
      })),
    };
  });
}
function tables() {
  const words = cell => cell.textContent.replace(/\s+/g, " ").trim();
  return [...document.querySelectorAll("table")].map(table => ({
    head: [...table.querySelectorAll("thead th")].map(words),
    rows: [...table.querySelectorAll("tbody tr")].map(row => [...row.cells].map(words)),
  }));
}

const root = document.documentElement;
return {
  title: document.title,
  sideways: root.scrollWidth - root.clientWidth,
  words: document.body.innerText,
  ground: ground(document.body),
  texts: texts(),
  plots: plots(),
  tables: tables(),
};
