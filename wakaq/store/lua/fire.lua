-- Enqueues one tick of a schedule, unless this or a later tick was enqueued already.
-- KEYS[1]  string, unix time of the last tick enqueued    KEYS[2]  queue (list)
-- ARGV[1]  unix time of the tick    ARGV[2]  payload    ARGV[3]  seconds to remember the tick
-- Returns 1 if it was enqueued.
local last = tonumber(redis.call('GET', KEYS[1]) or '') or -1
if tonumber(ARGV[1]) <= last then return 0 end
-- First, since it may fail: no tick is remembered that was not enqueued.
redis.call('RPUSH', KEYS[2], ARGV[2])
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[3])
return 1
