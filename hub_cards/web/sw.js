// Keeps every file of the page, so that it opens without a network after the first visit.

// Publishing puts the digest of all files here: another one begins a new store.
const VERSION = "unpublished";
// Other pages of the same origin have stores of their own.
const STORES = `rs-transformer-${registration.scope}-`;
const STORE = STORES + VERSION;
const SHELL = ["./", "app.js", "sentences.js", "worker.js", "style.css", "models.json"];

async function storesBefore() {
  return (await caches.keys()).filter((name) => name.startsWith(STORES) && name !== STORE);
}

/** Put into the store what it lacks of some files; those that are no more may be missing, unless they are needed. */
async function keep(urls, needed = true) {
  const store = await caches.open(STORE);
  const keepOne = async (url) => {
    if (await store.match(url)) return;
    // What the browser's own cache has, may be a file of the page before: it is asked if it is still the same.
    const fetched = await fetch(url, { cache: "no-cache" });
    if (fetched.ok) await store.put(url, fetched);
    else if (needed || fetched.status !== 404) throw new Error(`${url}: ${fetched.status}`);
  };
  await Promise.all(urls.map(keepOne));
}

async function install() {
  await keep(SHELL);
  // What has worked without a network is to do so in this version, too; if it cannot be had now, the one before stays.
  for (const name of await storesBefore()) {
    const kept = await (await caches.open(name)).keys();
    await keep(kept.map(({ url }) => url), false);
  }
  await skipWaiting();
}

async function activate() {
  await Promise.all((await storesBefore()).map((name) => caches.delete(name)));
  await clients.claim();
}

addEventListener("install", (event) => event.waitUntil(install()));
addEventListener("activate", (event) => event.waitUntil(activate()));

// The page names the files that it needs, and is told whether all of them are kept.
addEventListener("message", (event) => {
  const [port] = event.ports;
  event.waitUntil(keep(event.data).then(() => port.postMessage(true), () => port.postMessage(false)));
});

async function answer(event) {
  const { request } = event;
  const store = await caches.open(STORE);
  // Servers that have no /index.html answer by sending the browser on, which a kept answer must not.
  const isIndex = request.mode === "navigate" && new URL(request.url).pathname.endsWith("/index.html");
  const kept = await store.match(isIndex ? "./" : request, { ignoreSearch: true });
  if (kept) return kept;
  const fetched = await fetch(request, { cache: "no-cache" });
  // Meanwhile the page reads on; where the store is full, it works all the same.
  if (fetched.ok && !fetched.redirected) event.waitUntil(store.put(request, fetched.clone()).catch(() => {}));
  return fetched;
}

addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === location.origin) event.respondWith(answer(event));
});
