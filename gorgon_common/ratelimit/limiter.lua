-- The limiter: decides about one key (a model of one provider account); each request atomically, all in one call.
-- This file has the state, the buckets and the queue; acquire.lua and settle.lua continue it: `redis.py` joins them.
--
-- `decisions.py` and the modules that it uses make the same decisions in Python.  Every change must be made in both; the
-- suites in tests/contract/test_limiter*.py check that both give the same answers.
--
-- KEYS   1 state of the key   2 state of the account   3 waiting calls (due)   4 places of the waiting calls
-- ARGV   1 milliseconds to add to the clock (tests)   2 the requests (JSON; wire.py builds them and reads the replies)
--
-- The states are read once and written once, as a whole (MessagePack), because each command costs more than a few
-- hundred bytes do.  Only the waiting calls are kept apart, because there may be thousands of them.
-- The fields of a state are described in buckets.py.  A call in flight is packed as an array (`pack_call`).
-- All times are in milliseconds of the server's clock.

local STATE, ACCOUNT, WAITING, PLACES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local call, max, min = redis.call, math.max, math.min

local BURST = 0.05            -- of the limit: the capacity of a bucket
local READY = 0.5             -- of the burst: a larger call starts at this level and leaves a negative level
local VALVE = 0.8             -- of the burst: above it no turn is required, so that quota is not lost
local FIRST, FULL = 0.95, 1.0 -- share of the limit that is refilled: at first, and once the headers agree
local RAISE = 0.01            -- of that share, per second
local DECREASE, FLOOR = 0.5, 0.05
local RECOVERY = 0.2          -- of the rate, for each second of capacity used
local EPOCH = 1000            -- at most one decrease in this period
local GRACE = 5000            -- a waiting call that has not returned this long after it was due is removed
local SEEN = 60000            -- workers that asked within this period count
local PATIENT = 10000         -- longer waits are shortened towards this value, because much may change meanwhile
local OLD = 10000             -- from this age on, the amount for the first call of a queue is kept free
local LONG = 3600000          -- a bucket of a longer period is not emptied, because it would take hours to refill
local IDLE = 600000           -- a bucket of one label (a channel) that was not used for so long is forgotten
local TIDY = 500              -- the maximum number of waiting calls that one call removes
local STATE_KEPT, QUEUE_KEPT = 172800000, 3600000
local CLOSE = 1000            -- calls admitted within this period may arrive in a different order
local STILL, WATCH = 250, 1500 -- a reset that moves by less than STILL within WATCH is the end of a window
local B_WINDOW, B_CALLS, B_SHARE, B_FIRST, B_LONGEST, B_PROBE = 10, 20, 0.5, 5000, 120000, 60000

local clock = call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000 + tonumber(ARGV[1])

local stored = call('MGET', STATE, ACCOUNT)
local account, account_changed, changed = stored[2] and cmsgpack.unpack(stored[2]) or {}, false, false
local state = stored[1] and cmsgpack.unpack(stored[1]) or {
  fill = FIRST, slowdown = 1, granted = 0, denied = 0, refused = 0, refusals = 0, virtual = 0, weights = 0,
  in_flight = 0, waiting = 0, dimensions = {}, calls = {}, workers = {}, finish = {}, teams = {}
}
local dimensions = state.dimensions

local function save()
  if changed then call('SET', STATE, cmsgpack.pack(state), 'PX', STATE_KEPT) end
  if account_changed then call('SET', ACCOUNT, cmsgpack.pack(account), 'PX', STATE_KEPT) end
end

local function pack_call(c)
  return cmsgpack.pack({c.ends, c.team, c.weight, c.at, c.number, c.share, c.lease, c.reserved, c.before})
end
local function unpack_call(packed)
  local c = cmsgpack.unpack(packed)
  return {
    ends = c[1], team = c[2], weight = c[3], at = c[4], number = c[5], share = c[6], lease = c[7], reserved = c[8],
    before = c[9]
  }
end

-- Buckets.

local function capacity(b) return max(BURST * b.limit, 1.5 * b.whole) end
local function rate(b) return b.limit * state.fill * state.slowdown / b.period end
local function level(b)
  local cap = capacity(b)
  if not b.level then
    -- After a cold start, or if Redis has lost its data: start with one second's worth, never with a full burst.
    return min(cap, max(b.limit * FIRST * 1000 / b.period, b.whole))
  end
  if b.level >= cap then return b.level end
  return min(cap, b.level + max(0, now - b.at) * rate(b))
end
local function put(b, value) b.level, b.at = value, now end
local function refresh() -- must precede every change of a rate
  for _, b in pairs(dimensions) do if b.limit then put(b, level(b)) end end
end
local function starts(b, cost) -- the level at which a call starts
  if b.whole > 0 then return cost end
  return min(cost, capacity(b) * READY)
end

-- The remaining quota that the provider itself has reported; nil if that is unknown or outdated.
local function told(b)
  if not b.left or now >= b.left_until then return nil end
  if b.window then return b.left end -- a window: nothing is refilled before its end
  return b.left + max(0, now - b.left_at) * b.limit / b.period
end

-- The queue.

local function leave(member)
  call('ZREM', WAITING, member)
  if call('HDEL', PLACES, member) == 0 then return end
  state.waiting = max(0, state.waiting - 1)
  local name = string.match(member, '^(.-)\n')
  local team = state.teams[name]
  if not team then return end
  if team.first and team.first.member == member then team.first = nil end
  team.gone = team.gone + 1
  if team.gone >= team.came then
    state.weights = max(0, state.weights - team.weight)
    state.teams[name] = nil
  end
end

local function due(time) state.tidy_at = min(state.tidy_at or time, time) end

local function tidy()
  if not state.tidy_at or now < state.tidy_at then return end
  state.tidy_at = nil
  for id, packed in pairs(state.calls) do
    local ends = unpack_call(packed).ends
    if ends <= now then -- after a crash its lease is freed; what it reserved stays spent
      state.calls[id], state.in_flight = nil, state.in_flight - 1
    else due(ends) end
  end
  for _, member in ipairs(call('ZRANGEBYSCORE', WAITING, '-inf', now - GRACE, 'LIMIT', 0, TIDY)) do leave(member) end
  local earliest = call('ZRANGE', WAITING, 0, 0, 'WITHSCORES')
  if earliest[2] then due(tonumber(earliest[2]) + GRACE)
  else state.waiting, state.weights, state.teams = 0, 0, {} end -- also if Redis has dropped the keys of the queue
  for name, b in pairs(dimensions) do
    if b.labelled and now - (b.at or now) >= IDLE then dimensions[name] = nil end
  end
end

-- Would this call take capacity that cannot be refilled in time for a call that has long been first in its queue?
local function robs(elder, cost)
  if not elder or now - elder.since < OLD then return false end
  local ahead = max(0, elder.due - now)
  for name, theirs in pairs(elder.cost) do
    local b, ours = dimensions[name], cost[name] or 0
    if b and b.limit and theirs > 0 and ours > 0 then
      if level(b) - ours + ahead * rate(b) < starts(b, theirs) then return true end
      local left = told(b)
      if left and b.window then
        if left >= theirs and left - ours < theirs then return true end
      elseif left and left - ours + ahead * b.limit / b.period < theirs then return true end
    end
  end
  return false
end
