/* Runs a client's uses one after the other and prints what came of each, in the form of ../python/uses.py. */

const uses = new Map();

/** give: returns, or promises, what JSON can hold. */
export function use(name, give) {
  uses.set(name, give);
}

export async function runAll() {
  const found = {};
  for (const [name, give] of uses) {
    try {
      found[name] = { gave: await give() };
    } catch (error) {
      found[name] = { failed: error.stack + (error.responseBody ? `\n${error.responseBody}` : "") };
    }
  }
  process.stdout.write(JSON.stringify(found));
}
